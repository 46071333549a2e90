// The sum of a row as norm.h has it: a slot a thread, of a block or of a cluster of blocks.
#pragma once

#include "cuda/device/ptx.cuh"
#include "norm.h"

namespace sgl_comm::device {

// Sums over the slots of a row, one after the other, in which all threads of its block or cluster take part. Each warp
// sends the sum of its own slots to every block of the cluster.
class RowSum {
 public:
  // Of the block, in shared memory. A sum uses the one half and the next the other: whoever has the next sum knows that
  // all have read the one before.
  struct Room {
    float trees[2][kTree];
    uint64_t arrivals[2];  // barriers that count the bytes of `trees` which have come from the cluster's blocks
  };

  // begin() stands between this and the first sum.
  __device__ __forceinline__ explicit RowSum(Room& room)
      : room_(room), blocks_(ptx::cluster_size()), block_(ptx::cluster_rank()) {
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

  __device__ __forceinline__ uint32_t slot() const { return block_ * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ uint32_t num_slots() const { return blocks_ * blockDim.x; }

  __device__ __forceinline__ float of(float slot_total) {
    const float total = of_warp(slot_total);
    const uint32_t num_trees = num_slots() / kTree, lane = threadIdx.x % kTree;
    if (num_trees == 1) return total;
    const uint32_t half = count_ % 2;
    float* const trees = room_.trees[half];
    if (blocks_ == 1) {
      if (lane == 0) trees[slot() / kTree] = total;
      __syncthreads();
    } else {
      uint64_t* const arrivals = &room_.arrivals[half];
      if (threadIdx.x == 0) ptx::arrive_expecting(arrivals, num_trees * sizeof(float));
      if (lane < blocks_) ptx::store_async(trees + slot() / kTree, arrivals, lane, total);
      ptx::await_phase(arrivals, count_ / 2 % 2);
    }
    ++count_;
    return of_warp(lane < num_trees ? trees[lane] : 0.0f);
  }

 private:
  static __device__ __forceinline__ float of_warp(float v) {
#pragma unroll
    for (int half = kTree / 2; half > 0; half /= 2) v = add(v, __shfl_xor_sync(0xffffffffu, v, half));
    return v;
  }

  Room& room_;
  const uint32_t blocks_, block_;
  uint32_t count_ = 0;
};

}  // namespace sgl_comm::device
