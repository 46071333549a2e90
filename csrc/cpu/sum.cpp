#include "cpu/sum.h"

#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/floating_point.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // gcc 12's own AVX-512 headers
#endif

// vec.h is included once an instruction set, each time in a namespace of its own and, on x86, in a region whose
// functions may use that set; every header it needs is included above, outside the regions.
#if defined(__clang__)
#define SGL_TARGET_BEGIN(set) _Pragma(SGL_TEXT(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define SGL_TARGET_END _Pragma("clang attribute pop")
#else
#define SGL_TARGET_BEGIN(set) _Pragma("GCC push_options") _Pragma(SGL_TEXT(GCC target(set)))
#define SGL_TARGET_END _Pragma("GCC pop_options")
#endif
#define SGL_TEXT(...) #__VA_ARGS__

#if defined(__x86_64__)
#include <immintrin.h>
SGL_TARGET_BEGIN("avx512f,avx512bw,avx512vl")
namespace sgl_comm::avx512 {
#define SGL_VEC_AVX512
#include "cpu/vec.h"
#undef SGL_VEC_AVX512
}  // namespace sgl_comm::avx512
SGL_TARGET_END
SGL_TARGET_BEGIN("avx2,f16c")
namespace sgl_comm::avx2 {
#define SGL_VEC_AVX2
#include "cpu/vec.h"
#undef SGL_VEC_AVX2
}  // namespace sgl_comm::avx2
SGL_TARGET_END
#elif defined(__aarch64__)
#include <arm_neon.h>
namespace sgl_comm::neon {
#define SGL_VEC_NEON
#include "cpu/vec.h"
#undef SGL_VEC_NEON
}  // namespace sgl_comm::neon
#endif
namespace sgl_comm::scalar {
#include "cpu/vec.h"
}  // namespace sgl_comm::scalar

namespace sgl_comm {

namespace {

using SumVectors = size_t (*)(DType, void* out, const void* const* sources, int num_sources, size_t count);

// The best that this machine has and SGLCOMM_CPU_INSTRUCTIONS allows: what it names, or less.
SumVectors choose_instructions() {
  std::string limit;
  for (const char* name : {"SGLCOMM_CPU_INSTRUCTIONS", "SGL_COMM_CPU_INSTRUCTIONS"}) {  // the second is its old name
    const char* text = std::getenv(name);
    if (limit.empty() && text != nullptr) limit = text;
  }
  bool allowed = limit.empty();
  const auto take = [&](const char* name) { return allowed = allowed || limit == name; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (take("avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl")) {
    return avx512::sum_vectors;
  }
  // f16c came before avx2 in every processor that has both.
  if (take("avx2") && __builtin_cpu_supports("avx2")) return avx2::sum_vectors;
#elif defined(__aarch64__)
  if (take("neon")) return neon::sum_vectors;
#endif
  return scalar::sum_vectors;
}

}  // namespace

void sum_in_order(DType dtype, void* out, const void* const* sources, int num_sources, size_t count) {
  const DefaultFloatingPoint guard;
  static const SumVectors sum = choose_instructions();
  const size_t done = sum(dtype, out, sources, num_sources, count);
  if (done == count) return;
  const auto rest = [&](auto* p) { return p + done * size_of(dtype); };
  const void* ends[kMaxWorld];
  for (int r = 0; r < num_sources; ++r) ends[r] = rest(static_cast<const char*>(sources[r]));
  scalar::sum_vectors(dtype, rest(static_cast<char*>(out)), ends, num_sources, count - done);
}

}  // namespace sgl_comm
