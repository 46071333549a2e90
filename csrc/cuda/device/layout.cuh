// How a kernel finds the packs of its tensors: packs are numbered in row-major order whatever the strides,
// so ranks may differ in theirs. A layout loads packs of `in` and stores packs of `out` with the functions of pack.cuh,
// and says by ParametersOf<P> what a kernel with parameters P must be given for it.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/parameters.h"

namespace sgl_comm::device {

template <typename T, bool kAligned>
struct RowMajor {
  using Element = T;
  template <typename Parameters>
  using ParametersOf = Parameters;

  template <typename Parameters>
  static __device__ __forceinline__ uint4 load(const Parameters& params, int64_t index) {
    return load_pack<T, kAligned>(params.in, params.count, index);
  }
  template <typename Parameters>
  static __device__ __forceinline__ uint4 load_existing(const Parameters& params, int64_t index) {
    return device::load_existing<T, kAligned>(params.in, params.count, index);
  }
  template <typename Parameters>
  static __device__ __forceinline__ void store(const Parameters& params, int64_t index, uint4 v) {
    store_pack<T, kAligned>(params.out, params.count, index, v);
  }
  template <typename Parameters>
  static __device__ __forceinline__ void store_existing(const Parameters& params, int64_t index, uint4 v) {
    device::store_existing<T, kAligned>(params.out, params.count, index, v);
  }
};

template <typename T>
class Strided {
 public:
  using Element = T;
  template <typename Parameters>
  using ParametersOf = WithStrides<Parameters>;

  template <typename Parameters>
  static __device__ __forceinline__ uint4 load(const Parameters& params, int64_t index) {
    const ElementOffsets offsets(params.in_strides, index);
    return load_elements<T>(params.in, params.count - index * kElements<T>, offsets);
  }
  template <typename Parameters>
  static __device__ __forceinline__ uint4 load_existing(const Parameters& params, int64_t index) {
    return load(params, index);
  }
  template <typename Parameters>
  static __device__ __forceinline__ void store(const Parameters& params, int64_t index, uint4 v) {
    const ElementOffsets offsets(params.out_strides, index);
    store_elements<T>(params.out, params.count - index * kElements<T>, offsets, v);
  }
  template <typename Parameters>
  static __device__ __forceinline__ void store_existing(const Parameters& params, int64_t index, uint4 v) {
    store(params, index, v);
  }

 private:
  // Where the elements of a pack lie. All offsets are known before the first load, so that the loads are under way
  // together.
  class ElementOffsets {
   public:
    __device__ __forceinline__ ElementOffsets(const Strides& strides, int64_t index) {
      constexpr int kLast = Strides::kDims - 1;
      uint32_t rest = static_cast<uint32_t>(index * kElements<T>), offset = 0, at[Strides::kDims];
#pragma unroll
      for (int d = kLast; d > 0; --d) {
        const uint32_t size = strides.sizes[d], quotient = rest / size;
        at[d] = rest - quotient * size;
        offset += at[d] * strides.strides[d];
        rest = quotient;
      }
      offset += rest * strides.strides[0];
#pragma unroll
      for (int i = 0; i < kElements<T>; ++i) {
        offsets_[i] = offset;
        offset += strides.strides[kLast];
        bool full = true;
#pragma unroll
        for (int d = kLast; d > 0; --d) {
          at[d] += full;
          full = at[d] == strides.sizes[d];
          if (full) offset += strides.strides[d - 1] - at[d] * strides.strides[d];
          if (full) at[d] = 0;
        }
      }
    }

    __device__ __forceinline__ uint32_t operator()(int i) const { return offsets_[i]; }

   private:
    uint32_t offsets_[kElements<T>];  // beyond the end, anything
  };
};

}  // namespace sgl_comm::device
