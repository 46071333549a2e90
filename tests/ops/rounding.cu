// csrc/cuda/device/rounding.cuh against the compiler's own division and square root: every fp32 number for the root and
// its inverse, and for the quotients by many lengths of a row. Prints how many were compared and how many differ.
// Build: nvcc -I csrc -o rounding rounding.cu
#include <cstdint>
#include <cstdio>

#include "cuda/device/rounding.cuh"

namespace {

using sgl_comm::device::inverse_of_root;
using sgl_comm::device::quotient;
using sgl_comm::device::root;

__device__ bool differ(float a, float b) { return __float_as_uint(a) != __float_as_uint(b) && (a == a || b == b); }

struct Differences {
  unsigned long long root, inverse, quotient;
};

// A thread a number at a time; `length` 0 is for the roots.
__global__ void compare(uint32_t length, Differences* found) {
  const uint64_t step = uint64_t{gridDim.x} * blockDim.x;
  const float b = static_cast<float>(length), inverse = __frcp_rn(b);
  for (uint64_t bits = uint64_t{blockIdx.x} * blockDim.x + threadIdx.x; bits < uint64_t{1} << 32; bits += step) {
    const float a = __uint_as_float(static_cast<uint32_t>(bits));
    if (length != 0) {
      if (differ(quotient(a, b, inverse), __fdiv_rn(a, b))) atomicAdd(&found->quotient, 1ull);
    } else if (a >= 0.0f || a != a) {
      const float expected = __fsqrt_rn(a);
      if (differ(root(a), expected)) atomicAdd(&found->root, 1ull);
      if (differ(inverse_of_root(expected), __fdiv_rn(1.0f, expected))) atomicAdd(&found->inverse, 1ull);
    }
  }
}

}  // namespace

int main() {
  Differences* found = nullptr;
  if (cudaMallocManaged(&found, sizeof *found) != cudaSuccess) {
    std::fprintf(stderr, "no GPU memory\n");
    return 2;
  }
  *found = {};
  int lengths = 0;
  const auto divide_by = [&](uint32_t length) {
    compare<<<1056, 256>>>(length, found);
    ++lengths;
  };
  compare<<<1056, 256>>>(0, found);
  for (uint32_t length = 1; length <= 64; ++length) divide_by(length);
  for (const uint32_t length : {384u, 512u, 576u, 1027u, 2880u, 4096u, 5120u, 7168u, 8192u, 16384u, 16400u, 65535u,
                                (1u << 24) - 1, 1u << 24, 0xffffffffu}) {
    divide_by(length);
  }
  uint32_t random = 1;
  for (int i = 0; i < 64; ++i) {
    random = random * 1664525u + 1013904223u;
    divide_by((random >> 8) | 1);
  }
  if (cudaDeviceSynchronize() != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(cudaGetLastError()));
    return 2;
  }
  std::printf("quotients by %d lengths: %llu differ; roots: %llu; their inverses: %llu\n", lengths, found->quotient,
              found->root, found->inverse);
  return found->quotient + found->root + found->inverse == 0 ? 0 : 1;
}
