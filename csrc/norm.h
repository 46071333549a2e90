// RMSNorm and LayerNorm of a row, to the bit: which element is added to which, and how each step is rounded. The CPU
// and the CUDA kernels share this, so their results agree by construction. CUDA headers alone, or none.
//
// The sum of a row depends on its length alone. Vectors of 8 neighbouring elements (the last is filled up with zeros)
// are added as sum_of_vector() says. A row has n = row_partials(hidden) partial sums, a multiple of 32; partial sum p
// adds vectors p, p + n, p + 2n, ... in that order. 32 neighbouring partial sums are added as a tree: first those 16
// apart, then those 8 apart, down to neighbours. If there are several trees, at most 32, their sums are added as one
// more tree, filled up with zeros. On a GPU a thread has one or two partial sums, and a tree is a warp's butterfly.
//
// Every operation is rounded by itself: no product is fused with a sum.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#include "cuda/device/rounding.cuh"
#define SGL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define SGL_HOST_DEVICE inline
#endif

namespace sgl_comm {

// fp32, to nearest even. The host's compiler is told not to fuse (-ffp-contract=off).
SGL_HOST_DEVICE float mul(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
SGL_HOST_DEVICE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// A row's length, for divisions by it.
struct RowLength {
  float value, inverse;
};
inline RowLength row_length(int64_t hidden) {
  const float value = static_cast<float>(hidden);
  return {value, 1.0f / value};
}

SGL_HOST_DEVICE float divide(float a, RowLength length) {
#ifdef __CUDA_ARCH__
  return device::quotient(a, length.value, length.inverse);
#else
  return a / length.value;
#endif
}
// 1 / sqrt(a), where the root is rounded first.
SGL_HOST_DEVICE float inverse_square_root(float a) {
#ifdef __CUDA_ARCH__
  return device::inverse_of_root(device::root(a));
#else
  return 1.0f / std::sqrt(a);
#endif
}

constexpr int kVector = 8, kTree = 32, kMostPartials = kTree * kTree;

SGL_HOST_DEVICE int64_t row_vectors(int64_t hidden) { return (hidden + kVector - 1) / kVector; }
SGL_HOST_DEVICE int row_partials(int64_t hidden) {
  const int64_t partials = (row_vectors(hidden) + kTree - 1) / kTree * kTree;
  return partials < kMostPartials ? static_cast<int>(partials) : kMostPartials;
}

// The sum of a vector: elements half a vector apart are added first, then those a quarter apart, then neighbours.
SGL_HOST_DEVICE float sum_of_vector(const float (&v)[kVector]) {
  const float a = add(v[0], v[4]), b = add(v[1], v[5]), c = add(v[2], v[6]), d = add(v[3], v[7]);
  return add(add(a, c), add(b, d));
}

// What a norm is, besides its weights.
struct Norm {
  bool layer;  // LayerNorm, else RMSNorm
  float eps;
  float weight_offset;  // added to each weight
};

// The factor of a row whose squares (LayerNorm: squared distances from the mean) sum up to `squares`.
SGL_HOST_DEVICE float norm_factor(float squares, RowLength length, float eps) {
  return inverse_square_root(add(divide(squares, length), eps));
}

// One element of the result: `value` is the row's (LayerNorm: less the mean), `weight` has its offset. A bias is added
// afterwards.
SGL_HOST_DEVICE float normalised(float value, float factor, float weight) { return mul(mul(value, factor), weight); }

}  // namespace sgl_comm
