// Division and square root, rounded to nearest even, without the calls that the compiler's own make for numbers which
// seldom occur: a kernel with a call in it, though never made, takes 0.25 us longer. CUDA headers alone.
//
// What the hardware approximates is corrected by what it leaves over, which a fused multiply-add gives exactly
// (Markstein, Computation of elementary functions on the IBM RISC System/6000 processor, 1990). tests/ops/rounding.cu
// compares them with the compiler's own.
#pragma once

#include <cuda_runtime.h>

namespace sgl_comm::device {

// a / b, of fp32 both, where `inverse` is 1 / b, rounded, and b from 1 to 2^32. Of a tiny `a` what is left over would
// be too small, or the quotient would be rounded twice. In fp64 neither happens, but that takes ten times as long.
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
  if (!(fabsf(a) < 0x1p-90f) || a == 0.0f) {
    const float q = __fmul_rn(a, inverse);
    const float rest = __fmaf_rn(-q, b, a);
    return a == 0.0f || rest != rest ? q : __fmaf_rn(rest, inverse, q);  // 0 keeps its sign; infinity leaves NaN over
  }
  const double divisor = b, x = a, near = inverse;
  const double wide = near * fma(-divisor, near, 2.0);  // 1 / b to 46 bits
  const double q = x * wide;
  return __double2float_rn(fma(fma(-q, divisor, x), wide, q));
}

// sqrt(a) for a >= 0 or NaN.
__device__ __forceinline__ float root(float a) {
  const bool small = a < 0x1p-90f;  // scaled, so that no rest is lost
  const float x = small ? __fmul_rn(a, 0x1p96f) : a;
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  const float s = __fmul_rn(x, y);
  const float corrected = __fmaf_rn(__fmaf_rn(-s, s, x), __fmul_rn(y, 0.5f), s);
  if (a == 0.0f || a == INFINITY) return a;
  return small ? __fmul_rn(corrected, 0x1p-48f) : corrected;
}

// 1 / a for a root: 0, from 2^-75 to 2^64, infinity, or NaN.
__device__ __forceinline__ float inverse_of_root(float a) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(a));
  const float corrected = __fmaf_rn(__fmaf_rn(-a, y, 1.0f), y, y);
  return a == 0.0f || a == INFINITY ? y : corrected;
}

}  // namespace sgl_comm::device
