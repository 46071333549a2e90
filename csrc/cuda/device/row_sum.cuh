// The sum of a row as norm.h has it, by the threads of a block or of a cluster of blocks.
#pragma once

#include "cuda/device/ptx.cuh"
#include "norm.h"

namespace sgl_comm::device {

// A block's, in shared memory, for its row sums. A sum uses the one half and the next the other: whoever has the next
// sum knows that all have read the one before.
struct RowSumRoom {
  alignas(16) float trees[2][kTree];  // zeros where there are fewer
  uint64_t arrivals[2];  // barriers that count the bytes of `trees` which have come from the cluster's blocks
};

// Sums over the slots of a row, one after the other, in which all threads of its block or cluster take part, each with
// kSlots slots. Each warp sends the sums of its own slots to every block of the cluster.
template <int kSlots>
class RowSum {
 public:
  // begin() stands between this and the first sum.
  __device__ __forceinline__ explicit RowSum(RowSumRoom& room)
      : room_(room), blocks_(ptx::cluster_size()), block_(ptx::cluster_rank()) {
    if (threadIdx.x < kTree && threadIdx.x >= num_trees()) {
      room.trees[0][threadIdx.x] = room.trees[1][threadIdx.x] = 0.0f;
    }
    if (blocks_ == 1) return;
    if (threadIdx.x == 0) {
      ptx::init_barrier(&room.arrivals[0], 1);
      ptx::init_barrier(&room.arrivals[1], 1);
    }
    ptx::cluster_arrive();
  }
  // No block sends to another that has not begun.
  __device__ __forceinline__ void begin() const {
    if (blocks_ > 1) ptx::cluster_wait();
  }

  // This thread's first slot; the next one is num_threads() on.
  __device__ __forceinline__ uint32_t slot() const { return block_ * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ uint32_t num_threads() const { return blocks_ * blockDim.x; }

  __device__ __forceinline__ float of(const float (&slot_totals)[kSlots]) {
    float totals[kSlots];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) totals[s] = of_warp(slot_totals[s]);
    if (num_trees() == 1) return totals[0];
    const uint32_t lane = threadIdx.x % kTree;
    const uint32_t half = count_ % 2;
    float* const trees = room_.trees[half];
    if (blocks_ == 1) {
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (lane == 0) trees[(slot() + s * num_threads()) / kTree] = totals[s];
      }
      __syncthreads();
    } else {
      uint64_t* const arrivals = &room_.arrivals[half];
      if (threadIdx.x == 0) ptx::arrive_expecting(arrivals, num_trees() * sizeof(float));
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        if (lane < blocks_) ptx::store_async(trees + (slot() + s * num_threads()) / kTree, arrivals, lane, totals[s]);
      }
      ptx::await_phase(arrivals, count_ / 2 % 2);
    }
    ++count_;
    return of_trees(trees, num_trees() <= kTree / 2);
  }

 private:
  __device__ __forceinline__ uint32_t num_trees() const { return kSlots * num_threads() / kTree; }

  static __device__ __forceinline__ float of_warp(float v) {
#pragma unroll
    for (int half = kTree / 2; half > 0; half /= 2) v = add(v, __shfl_xor_sync(0xffffffffu, v, half));
    return v;
  }

  // The same of numbers in shared memory, of which the second half is zeros if there are few.
  static __device__ __forceinline__ float4 four_of(const float* trees, int i) {
    return *reinterpret_cast<const float4*>(trees + i);
  }
  static __device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return {add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w)};
  }
  static __device__ __forceinline__ float of_trees(const float* trees, bool few) {
    const auto pair = [&](int i) {
      return few ? four_of(trees, i) : plus(four_of(trees, i), four_of(trees, i + kTree / 2));
    };
    const float4 v = plus(plus(pair(0), pair(8)), plus(pair(4), pair(12)));
    const float total = add(add(v.x, v.z), add(v.y, v.w));
    return few ? add(total, 0.0f) : total;  // with those zeros it is never -0
  }

  RowSumRoom& room_;
  const uint32_t blocks_, block_;
  uint32_t count_ = 0;
};

}  // namespace sgl_comm::device
