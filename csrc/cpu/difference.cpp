#include "cpu/difference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/floating_point.h"

// The blocks' loops have nothing in them that a compiler could not turn into vectors; it makes one form an instruction
// set, of which the loader takes the best.
#if defined(__x86_64__) && defined(__GLIBC__) && (!defined(__clang__) || __clang_major__ >= 14)
#define SGL_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define SGL_VECTOR_CLONES
#endif
#define SGL_INLINE inline __attribute__((always_inline))

namespace sgl_comm {

namespace {

using torch::headeronly::ScalarType;

constexpr size_t kLanes = 16, kBlock = 2048;

template <typename To, typename From>
SGL_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// How many representable values two floats are apart, by their bits: neighbours 1, the two zeros 0.
template <typename Count, typename Bits, typename Word>
SGL_INLINE Count values_apart(Word a, Word b) {
  constexpr Word kSize = std::numeric_limits<Bits>::max();
  const Count x = a & kSize, y = b & kSize;
  return (a ^ b) < 0 ? x + y : x > y ? x - y : y - x;
}

// Bits: what is stored. Word: the same with its sign in as many bits as the vectors' lanes have.
struct Float32 {
  using Bits = int32_t;
  using Word = int32_t;
  static SGL_INLINE float value(Word bits) { return bits_as<float>(bits); }
  static SGL_INLINE uint32_t ulp(Word a, Word b) { return values_apart<uint32_t, Bits>(a, b); }
};

struct BFloat16 {
  using Bits = int16_t;
  using Word = int32_t;
  static SGL_INLINE float value(Word bits) { return bits_as<float>(uint32_t(bits) << 16); }
  static SGL_INLINE uint32_t ulp(Word a, Word b) { return values_apart<uint32_t, Bits>(a, b); }
};

struct Float16 {
  using Bits = int16_t;
  using Word = int32_t;
  static SGL_INLINE float value(Word bits) {
    const uint32_t word = bits, size = word & 0x7fff;
    const uint32_t scaled = bits_as<uint32_t>(bits_as<float>(size << 13) * 0x1p112f);
    const uint32_t special = size >= 0x7c00 ? 0x7f800000 : 0;
    return bits_as<float>(scaled | special | (word & 0x8000) << 16);
  }
  static SGL_INLINE uint32_t ulp(Word a, Word b) { return values_apart<uint32_t, Bits>(a, b); }
};

// The difference of one block: right as long as squares_are_right(); else the block must be compared slowly.
struct BlockSums {
  float theirs_squared, ours_squared, difference_squared, max_abs;
  uint32_t max_ulp, differing;
};

template <typename Element>
SGL_INLINE BlockSums sum_words(const int32_t* theirs, const int32_t* ours) {
  float aa[kLanes] = {}, bb[kLanes] = {}, dd[kLanes] = {}, largest[kLanes] = {};
  uint32_t ulp[kLanes] = {}, differing[kLanes] = {};
  for (size_t i = 0; i < kBlock; i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const int32_t p = theirs[i + lane], q = ours[i + lane];
      const float a = Element::value(p), b = Element::value(q), d = a - b;
      aa[lane] += a * a;
      bb[lane] += b * b;
      dd[lane] += d * d;
      const float size = std::fabs(d);
      largest[lane] = size > largest[lane] ? size : largest[lane];
      const uint32_t apart = Element::ulp(p, q);
      ulp[lane] = apart > ulp[lane] ? apart : ulp[lane];
      differing[lane] += p != q;
    }
  }
  BlockSums sums{};
  for (size_t lane = 0; lane < kLanes; ++lane) {
    sums.theirs_squared += aa[lane];
    sums.ours_squared += bb[lane];
    sums.difference_squared += dd[lane];
    sums.max_abs = std::max(sums.max_abs, largest[lane]);
    sums.max_ulp = std::max(sums.max_ulp, ulp[lane]);
    sums.differing += differing[lane];
  }
  return sums;
}

// Widened first, so that the lanes of the loop above have one width.
template <typename Element, int kShift>
SGL_INLINE BlockSums sum_halves(const int16_t* theirs, const int16_t* ours) {
  int32_t theirs_words[kBlock], ours_words[kBlock];
  for (size_t i = 0; i < kBlock; ++i) theirs_words[i] = static_cast<int32_t>(uint32_t(theirs[i]) << kShift);
  for (size_t i = 0; i < kBlock; ++i) ours_words[i] = static_cast<int32_t>(uint32_t(ours[i]) << kShift);
  BlockSums sums = sum_words<Element>(theirs_words, ours_words);
  sums.max_ulp >>= kShift;
  return sums;
}

SGL_VECTOR_CLONES BlockSums sum_float32(const int32_t* theirs, const int32_t* ours) {
  return sum_words<Float32>(theirs, ours);
}
SGL_VECTOR_CLONES BlockSums sum_bfloat16(const int16_t* theirs, const int16_t* ours) {
  return sum_halves<Float32, 16>(theirs, ours);  // a bfloat16 is the upper half of a float32
}
SGL_VECTOR_CLONES BlockSums sum_float16(const int16_t* theirs, const int16_t* ours) {
  return sum_halves<Float16, 0>(theirs, ours);
}

double distance(double a, double b) { return std::fabs(a - b); }
double distance(int64_t a, int64_t b) {
  return static_cast<double>(a > b ? uint64_t(a) - uint64_t(b) : uint64_t(b) - uint64_t(a));
}

// Any elements, one by one.
template <typename Element>
void add_slowly(Difference& sums, const typename Element::Bits* theirs, const typename Element::Bits* ours,
                size_t count) {
  for (size_t i = 0; i < count; ++i) {
    const auto a = Element::value(theirs[i]), b = Element::value(ours[i]);
    sums.differing += theirs[i] != ours[i];
    if constexpr (std::is_floating_point_v<decltype(Element::value(0))>) {
      sums.theirs_nan += std::isnan(a);
      sums.ours_nan += std::isnan(b);
      sums.theirs_inf += std::isinf(a);
      sums.ours_inf += std::isinf(b);
      if (!std::isfinite(a) || !std::isfinite(b)) continue;
    }
    ++sums.finite;
    const double x = static_cast<double>(a), y = static_cast<double>(b), d = distance(a, b);
    sums.theirs_squared += x * x;
    sums.ours_squared += y * y;
    sums.difference_squared += d * d;
    sums.max_abs = std::max(sums.max_abs, d);
    sums.max_ulp = std::max(sums.max_ulp, static_cast<double>(Element::ulp(theirs[i], ours[i])));
  }
}

struct Float64 {
  using Bits = int64_t;
  static double value(Bits bits) { return bits_as<double>(bits); }
  static uint64_t ulp(Bits a, Bits b) { return values_apart<uint64_t, Bits>(a, b); }
};

struct Int64 {
  using Bits = int64_t;
  static int64_t value(Bits bits) { return bits; }
  static int ulp(Bits, Bits) { return 0; }
};

// Whether no number was other than finite, and no square too large for fp32; nor, where it matters, too small.
bool squares_are_right(const BlockSums& sums) {
  constexpr float kSmall = 0x1p-100f;
  const float least = std::min({sums.theirs_squared, sums.ours_squared, sums.difference_squared});
  return std::isfinite(sums.theirs_squared + sums.ours_squared + sums.difference_squared) &&
         (sums.differing == 0 || least >= kSmall);
}

template <typename Element, typename SumBlock>
void add_blocks(Difference& sums, const void* theirs_bytes, const void* ours_bytes, size_t count, SumBlock sum_block) {
  using Bits = typename Element::Bits;
  const auto *theirs = static_cast<const Bits*>(theirs_bytes), *ours = static_cast<const Bits*>(ours_bytes);
  size_t i = 0;
  for (; i + kBlock <= count; i += kBlock) {
    const BlockSums block = sum_block(theirs + i, ours + i);
    if (!squares_are_right(block)) {
      add_slowly<Element>(sums, theirs + i, ours + i, kBlock);
      continue;
    }
    sums = sums + Difference{kBlock,
                             block.differing,
                             0,
                             0,
                             0,
                             0,
                             block.theirs_squared,
                             block.ours_squared,
                             block.difference_squared,
                             block.max_abs,
                             double(block.max_ulp)};
  }
  add_slowly<Element>(sums, theirs + i, ours + i, count - i);
}

}  // namespace

Difference operator+(const Difference& a, const Difference& b) {
  Difference sum = a;
  sum.finite += b.finite;
  sum.differing += b.differing;
  sum.theirs_nan += b.theirs_nan;
  sum.ours_nan += b.ours_nan;
  sum.theirs_inf += b.theirs_inf;
  sum.ours_inf += b.ours_inf;
  sum.theirs_squared += b.theirs_squared;
  sum.ours_squared += b.ours_squared;
  sum.difference_squared += b.difference_squared;
  sum.max_abs = std::max(a.max_abs, b.max_abs);
  sum.max_ulp = std::max(a.max_ulp, b.max_ulp);
  return sum;
}

bool can_compare(ScalarType dtype) {
  for (const ScalarType known :
       {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double, ScalarType::Long}) {
    if (dtype == known) return true;
  }
  return false;
}

Difference difference(ScalarType dtype, const void* theirs, const void* ours, size_t count) {
  const DefaultFloatingPoint guard;
  Difference sums;
  switch (dtype) {
    case ScalarType::Float:
      add_blocks<Float32>(sums, theirs, ours, count, sum_float32);
      break;
    case ScalarType::BFloat16:
      add_blocks<BFloat16>(sums, theirs, ours, count, sum_bfloat16);
      break;
    case ScalarType::Half:
      add_blocks<Float16>(sums, theirs, ours, count, sum_float16);
      break;
    case ScalarType::Double:
      add_slowly<Float64>(sums, static_cast<const int64_t*>(theirs), static_cast<const int64_t*>(ours), count);
      break;
    default:
      add_slowly<Int64>(sums, static_cast<const int64_t*>(theirs), static_cast<const int64_t*>(ours), count);
  }
  return sums;
}

}  // namespace sgl_comm
