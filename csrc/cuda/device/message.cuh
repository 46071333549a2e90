// How a push kernel finds its part of the work: its packs among those of the launch, and the shards of an array.
#pragma once

#include "cuda/device/push.cuh"

namespace sgl_comm::device {

// This thread among all of the launch. But in a one-shot of strided tensors, what it takes is the same on every rank.
struct Place {
  int64_t index, count;
};
__device__ __forceinline__ Place place_in_grid() {
  return {int64_t{blockIdx.x} * blockDim.x + threadIdx.x, int64_t{gridDim.x} * blockDim.x};
}

// A part of a row-major array.
template <typename T>
struct Part {
  const void* data;
  int64_t count;
};

// Shard `rank` of an array of `count` elements.
template <typename T>
__device__ __forceinline__ Part<T> shard_of(const Message& m, const void* array, int rank) {
  const int64_t first = rank * m.shard_count, left = m.count - first;
  return {static_cast<const typename T::Bits*>(array) + first, left < m.shard_count ? left : m.shard_count};
}

template <typename T, bool kWhole>
__device__ __forceinline__ uint4 load_of(const Part<T>& part, int64_t index) {
  return load_pack<T, kWhole>(part.data, part.count, index);
}

template <typename T, bool kWhole>
__device__ __forceinline__ void store_to(const Part<T>& part, int64_t index, uint4 v) {
  store_pack<T, kWhole>(const_cast<void*>(part.data), part.count, index, v);
}

}  // namespace sgl_comm::device
