// How a kernel finds the packs of its message's tensors: packs are numbered in row-major order whatever the strides,
// so ranks may differ in theirs. A layout loads packs of `in` and stores packs of `out`, with the words of pack.cuh; of
// a message M it needs a MessageOf<M>.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/parameters.h"

namespace sgl_comm::device {

template <typename T, bool kWhole>
struct RowMajor {
  using Element = T;
  template <typename Message>
  using MessageOf = Message;

  template <typename Message>
  static __device__ __forceinline__ uint4 load(const Message& m, int64_t index) {
    return load_pack<T, kWhole>(m.in, m.count, index);
  }
  template <typename Message>
  static __device__ __forceinline__ uint4 load_existing(const Message& m, int64_t index) {
    return device::load_existing<T, kWhole>(m.in, m.count, index);
  }
  template <typename Message>
  static __device__ __forceinline__ void store(const Message& m, int64_t index, uint4 v) {
    store_pack<T, kWhole>(m.out, m.count, index, v);
  }
  template <typename Message>
  static __device__ __forceinline__ void store_existing(const Message& m, int64_t index, uint4 v) {
    device::store_existing<T, kWhole>(m.out, m.count, index, v);
  }
};

template <typename T>
class Strided {
 public:
  using Element = T;
  template <typename Message>
  using MessageOf = WithStrides<Message>;

  template <typename Message>
  static __device__ __forceinline__ uint4 load(const Message& m, int64_t index) {
    const Places places(m.in_strides, index);
    return load_elements<T>(m.in, m.count - index * kElements<T>, places);
  }
  template <typename Message>
  static __device__ __forceinline__ uint4 load_existing(const Message& m, int64_t index) {
    return load(m, index);
  }
  template <typename Message>
  static __device__ __forceinline__ void store(const Message& m, int64_t index, uint4 v) {
    const Places places(m.out_strides, index);
    store_elements<T>(m.out, m.count - index * kElements<T>, places, v);
  }
  template <typename Message>
  static __device__ __forceinline__ void store_existing(const Message& m, int64_t index, uint4 v) {
    store(m, index, v);
  }

 private:
  // Where the elements of a pack lie. All is known before one is asked for, so that they are asked for at once.
  class Places {
   public:
    __device__ __forceinline__ Places(const Strides& strides, int64_t index) {
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
