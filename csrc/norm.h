// RMSNorm and LayerNorm of a row, to the bit: which element is added to which, and how each step is rounded. The CPU
// and the CUDA kernels share this, so their results agree by construction. CUDA headers alone, or none.
//
// The sum of a row depends on its length alone. Groups of 8 neighbouring elements (the last is filled up with zeros)
// are added as sum_of_group() says. There are row_slots(hidden) slots, a multiple of 32; slot s adds groups s, s +
// slots, s + 2 * slots, ... in that order. 32 neighbouring slots are added in the same way, those half of them apart
// first, down to neighbours, and so are the at most 32 sums of those, filled up with zeros, if there are several. On a
// GPU a thread has a slot or two, and 32 slots are a warp's butterfly.
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
// Of the square root, once that is rounded.
SGL_HOST_DEVICE float inverse_square_root(float a) {
#ifdef __CUDA_ARCH__
  return device::inverse_of_root(device::root(a));
#else
  return 1.0f / std::sqrt(a);
#endif
}

constexpr int kGroup = 8, kTree = 32, kMostSlots = kTree * kTree;

SGL_HOST_DEVICE int64_t row_groups(int64_t hidden) { return (hidden + kGroup - 1) / kGroup; }
SGL_HOST_DEVICE int row_slots(int64_t hidden) {
  const int64_t slots = (row_groups(hidden) + kTree - 1) / kTree * kTree;
  return slots < kMostSlots ? static_cast<int>(slots) : kMostSlots;
}

// Of a group: elements half a group apart first, then a quarter, then neighbours.
SGL_HOST_DEVICE float sum_of_group(const float (&v)[kGroup]) {
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

// One element: `value` is the row's (LayerNorm: less the mean), `weight` has its offset. A bias is added afterwards.
SGL_HOST_DEVICE float normalised(float value, float factor, float weight) { return mul(mul(value, factor), weight); }

}  // namespace sgl_comm
