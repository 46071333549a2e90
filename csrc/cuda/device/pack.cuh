// A pack: 16 bytes of a tensor, as fp32 lanes and back; and the sentinel that marks a word of a slot as not yet
// written.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/device/ptx.cuh"
#include "cuda/device/sizes.h"

namespace sgl_comm::device {

constexpr uint32_t kSentinel = 0xFFFFFFFFu;  // a NaN in fp32, and in both halves of bf16 and fp16

__device__ __forceinline__ uint4 sentinel_pack() { return {kSentinel, kSentinel, kSentinel, kSentinel}; }

// The pack with no word equal to the sentinel; a word that was stays a NaN, in each half.
__device__ __forceinline__ uint4 without_sentinel(uint4 v) {
  v.x = min(v.x, kSentinel - 1);
  v.y = min(v.y, kSentinel - 1);
  v.z = min(v.z, kSentinel - 1);
  v.w = min(v.w, kSentinel - 1);
  return v;
}

__device__ __forceinline__ bool any_sentinel(uint4 v) {
  return v.x == kSentinel || v.y == kSentinel || v.z == kSentinel || v.w == kSentinel;
}

struct Float32 {
  using Bits = uint32_t;
  static constexpr int kLanes = 4;
  static __device__ __forceinline__ void unpack(uint4 v, float (&lanes)[kLanes]) {
    lanes[0] = __uint_as_float(v.x);
    lanes[1] = __uint_as_float(v.y);
    lanes[2] = __uint_as_float(v.z);
    lanes[3] = __uint_as_float(v.w);
  }
  static __device__ __forceinline__ uint4 pack(const float (&lanes)[kLanes]) {
    return {__float_as_uint(lanes[0]), __float_as_uint(lanes[1]), __float_as_uint(lanes[2]), __float_as_uint(lanes[3])};
  }
};

struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kLanes = 8;
  static __device__ __forceinline__ void unpack(uint4 v, float (&lanes)[kLanes]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      lanes[2 * i] = __uint_as_float(words[i] << 16);
      lanes[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&lanes)[kLanes]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 two = __floats2bfloat162_rn(lanes[2 * i], lanes[2 * i + 1]);
      words[i] = reinterpret_cast<const uint32_t&>(two);
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

struct Float16 {
  using Bits = uint16_t;
  static constexpr int kLanes = 8;
  static __device__ __forceinline__ void unpack(uint4 v, float (&lanes)[kLanes]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 two = __half22float2(reinterpret_cast<const __half2&>(words[i]));
      lanes[2 * i] = two.x;
      lanes[2 * i + 1] = two.y;
    }
  }
  static __device__ __forceinline__ uint4 pack(const float (&lanes)[kLanes]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 two = __floats2half2_rn(lanes[2 * i], lanes[2 * i + 1]);
      words[i] = reinterpret_cast<const uint32_t&>(two);
    }
    return {words[0], words[1], words[2], words[3]};
  }
};

template <typename T>
__device__ __forceinline__ void accumulate(float (&total)[T::kLanes], uint4 pack) {
  float lanes[T::kLanes];
  T::unpack(pack, lanes);
#pragma unroll
  for (int i = 0; i < T::kLanes; ++i) total[i] = __fadd_rn(total[i], lanes[i]);
}

// The sum of one pack a rank, added in fp32 in the order of ranks and rounded once; ranks for which exists(r) is false
// are left out.
template <typename T, int kWorld, typename Exists>
__device__ __forceinline__ uint4 sum_in_order(const uint4 (&packs)[kWorld], Exists&& exists) {
  float total[T::kLanes];
  T::unpack(packs[0], total);
#pragma unroll
  for (int r = 1; r < kWorld; ++r) {
    if (exists(r)) accumulate<T>(total, packs[r]);
  }
  return T::pack(total);
}

// The sum in rank order where `others` are the packs of all ranks but `rank`, whose own pack is `own`.
template <typename T, int kOthers, typename Exists>
__device__ __forceinline__ uint4 sum_in_order(const uint4 (&others)[kOthers], uint4 own, int rank, Exists&& exists) {
  float total[T::kLanes];
  if constexpr (kOthers == 1) {  // a sum of two is the same in either order
    T::unpack(own, total);
    accumulate<T>(total, others[0]);
  } else {
#pragma unroll
    for (int i = 0; i < T::kLanes; ++i) total[i] = -0.0f;  // whatever is added to it is left as it is
#pragma unroll
    for (int r = 0; r < kOthers; ++r) {
      if (r == rank) accumulate<T>(total, own);
      if (exists(r)) accumulate<T>(total, others[r]);
    }
    if (rank == kOthers) accumulate<T>(total, own);
  }
  return T::pack(total);
}

// Elements without a value, for what is moved and not summed.
struct Bytes {
  using Bits = uint8_t;
};
struct BytePairs {
  using Bits = uint16_t;
};
struct ByteQuads {
  using Bits = uint32_t;
};

template <typename T>
constexpr int64_t kElements = kPackBytes / sizeof(typename T::Bits);  // of a pack

template <typename T, typename OffsetOf>
__device__ __forceinline__ uint4 load_elements(const void* array, int64_t num, OffsetOf&& offset_of) {
  using Bits = typename T::Bits;
  constexpr int kPerWord = 4 / sizeof(Bits);
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) {
    if (i >= num) continue;
    const uint32_t element = static_cast<const Bits*>(array)[offset_of(i)];
    words[i / kPerWord] |= element << (i % kPerWord * 8 * sizeof(Bits));
  }
  return {words[0], words[1], words[2], words[3]};
}

template <typename T, typename OffsetOf>
__device__ __forceinline__ void store_elements(void* array, int64_t num, OffsetOf&& offset_of, uint4 v) {
  using Bits = typename T::Bits;
  constexpr int kPerWord = 4 / sizeof(Bits);
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < kElements<T>; ++i) {
    if (i >= num) continue;
    const uint32_t element = words[i / kPerWord] >> (i % kPerWord * 8 * sizeof(Bits));
    static_cast<Bits*>(array)[offset_of(i)] = static_cast<Bits>(element);
  }
}

// A row-major array of T seen as packs. kAligned: 16-byte aligned and a whole number of packs; else neither is assumed,
// and the last pack is padded with zeros. load_existing() is for packs that have at least one element.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_existing(const void* array, int64_t count, int64_t index) {
  if constexpr (kAligned) {
    return ptx::load_input(static_cast<const uint4*>(array) + index);
  } else {
    const int64_t first = index * kElements<T>;
    return load_elements<T>(array, count - first, [=](int i) { return first + i; });
  }
}

// load_existing() for any index: beyond the end all is zeros.
template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_pack(const void* array, int64_t count, int64_t index) {
  if (kAligned && index * kElements<T> >= count) return {0, 0, 0, 0};
  return load_existing<T, kAligned>(array, count, index);
}

// Writes what of the pack lies within the array, which is at least one element.
template <typename T, bool kAligned>
__device__ __forceinline__ void store_existing(void* array, int64_t count, int64_t index, uint4 v) {
  if constexpr (kAligned) {
    static_cast<uint4*>(array)[index] = v;
  } else {
    const int64_t first = index * kElements<T>;
    store_elements<T>(
        array, count - first, [=](int i) { return first + i; }, v);
  }
}

// store_existing() for any index: beyond the end nothing is written.
template <typename T, bool kAligned>
__device__ __forceinline__ void store_pack(void* array, int64_t count, int64_t index, uint4 v) {
  if (!kAligned || index * kElements<T> < count) store_existing<T, kAligned>(array, count, index, v);
}

}  // namespace sgl_comm::device
