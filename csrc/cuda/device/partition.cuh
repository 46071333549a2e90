// How a kernel finds its part of the work: a thread's packs among those of the launch, and the shards of an array.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/parameters.h"

namespace sgl_comm::device {

// The number of a thread (or warp) in the launch, and how many there are. It takes packs (or rows) index, index +
// count, and so on: the same on every rank, except in a one-shot of strided tensors.
struct GridPosition {
  int64_t index, count;
};
__device__ __forceinline__ GridPosition grid_position() {
  return {int64_t{blockIdx.x} * blockDim.x + threadIdx.x, int64_t{gridDim.x} * blockDim.x};
}

// A part of a row-major array of T: where it begins, and how many elements it has.
template <typename T>
struct Part {
  const void* data;
  int64_t count;
};

// Shard `rank` of an array of `count` elements.
template <typename T>
__device__ __forceinline__ Part<T> shard_of(const PushParameters& params, const void* array, int rank) {
  const int64_t first = rank * params.shard_count, left = params.count - first;
  return {static_cast<const typename T::Bits*>(array) + first, left < params.shard_count ? left : params.shard_count};
}

template <typename T, bool kAligned>
__device__ __forceinline__ uint4 load_of(const Part<T>& part, int64_t index) {
  return load_pack<T, kAligned>(part.data, part.count, index);
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_to(const Part<T>& part, int64_t index, uint4 v) {
  store_pack<T, kAligned>(const_cast<void*>(part.data), part.count, index, v);
}

// A pack of a message that is divided into shards of equal numbers of packs: pack j of the shard of rank `owner`.
struct ShardPack {
  int owner;
  int j;
};
template <int kWorld>
__device__ __forceinline__ ShardPack shard_pack(int index, int shard_packs) {
  int owner = 0;
#pragma unroll
  for (int r = 1; r < kRanks<kWorld>; ++r) owner += index >= r * shard_packs ? 1 : 0;
  return {owner, index - owner * shard_packs};
}

}  // namespace sgl_comm::device
