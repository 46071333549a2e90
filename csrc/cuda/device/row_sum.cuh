// The sum of a row as norm.h has it, by the threads of a block or of a cluster of blocks.
#pragma once

#include "cuda/device/ptx.cuh"
#include "norm.h"

namespace sgl_comm::device {

// The shared memory of a block for its row sums. Consecutive sums use the two halves in turn: a thread that has the
// next sum knows that all threads have read the one before.
struct RowSumShared {
  alignas(16) float trees[2][kTree];  // zeros beyond the last tree
  uint64_t arrivals[2];  // barriers that count the bytes of `trees` which have come from the cluster's blocks
};

// Sums of rows, one after the other, in which all threads of a block or cluster take part, each with kPartials partial
// sums. Each warp sends the sums of its own trees to every block of the cluster.
template <int kPartials>
class RowSum {
 public:
  // Call begin() before the first sum.
  __device__ __forceinline__ explicit RowSum(RowSumShared& shared)
      : shared_(shared), blocks_(ptx::cluster_size()), block_(ptx::cluster_rank()) {
    if (threadIdx.x < kTree && threadIdx.x >= num_trees()) {
      shared.trees[0][threadIdx.x] = shared.trees[1][threadIdx.x] = 0.0f;
    }
    if (blocks_ == 1) return;
    if (threadIdx.x == 0) {
      ptx::init_barrier(&shared.arrivals[0], 1);
      ptx::init_barrier(&shared.arrivals[1], 1);
    }
    ptx::cluster_arrive();
  }
  // Waits until every block of the cluster can be sent to.
  __device__ __forceinline__ void begin() const {
    if (blocks_ > 1) ptx::cluster_wait();
  }

  // The number of this thread's first partial sum; that of its next one is larger by num_threads().
  __device__ __forceinline__ uint32_t first_partial() const { return block_ * blockDim.x + threadIdx.x; }
  __device__ __forceinline__ uint32_t num_threads() const { return blocks_ * blockDim.x; }

  __device__ __forceinline__ float of(const float (&partial_totals)[kPartials]) {
    float totals[kPartials];
#pragma unroll
    for (int s = 0; s < kPartials; ++s) totals[s] = of_warp(partial_totals[s]);
    if (num_trees() == 1) return totals[0];
    const uint32_t lane = threadIdx.x % kTree;
    const uint32_t half = count_ % 2;
    float* const trees = shared_.trees[half];
    if (blocks_ == 1) {
#pragma unroll
      for (int s = 0; s < kPartials; ++s) {
        if (lane == 0) trees[(first_partial() + s * num_threads()) / kTree] = totals[s];
      }
      __syncthreads();
    } else {
      uint64_t* const arrivals = &shared_.arrivals[half];
      if (threadIdx.x == 0) ptx::arrive_expecting(arrivals, num_trees() * sizeof(float));
#pragma unroll
      for (int s = 0; s < kPartials; ++s) {
        if (lane < blocks_)
          ptx::store_async(trees + (first_partial() + s * num_threads()) / kTree, arrivals, lane, totals[s]);
      }
      ptx::await_phase(arrivals, count_ / 2 % 2);
    }
    ++count_;
    return of_trees(trees, num_trees() <= kTree / 2);
  }

 private:
  __device__ __forceinline__ uint32_t num_trees() const { return kPartials * num_threads() / kTree; }

  static __device__ __forceinline__ float of_warp(float v) {
#pragma unroll
    for (int half = kTree / 2; half > 0; half /= 2) v = add(v, __shfl_xor_sync(0xffffffffu, v, half));
    return v;
  }

  static __device__ __forceinline__ float4 four_of(const float* trees, int i) {
    return *reinterpret_cast<const float4*>(trees + i);
  }
  static __device__ __forceinline__ float4 plus(float4 a, float4 b) {
    return {add(a.x, b.x), add(a.y, b.y), add(a.z, b.z), add(a.w, b.w)};
  }
  // The sum of up to kTree trees, which lie in shared memory; with `few` the second half of them is zeros.
  static __device__ __forceinline__ float of_trees(const float* trees, bool few) {
    const auto pair = [&](int i) {
      return few ? four_of(trees, i) : plus(four_of(trees, i), four_of(trees, i + kTree / 2));
    };
    const float4 v = plus(plus(pair(0), pair(8)), plus(pair(4), pair(12)));
    const float total = add(add(v.x, v.z), add(v.y, v.w));
    return few ? add(total, 0.0f) : total;  // with those zeros it is never -0
  }

  RowSumShared& shared_;
  const uint32_t blocks_, block_;
  uint32_t count_ = 0;
};

}  // namespace sgl_comm::device
