// Epochs, deadlines and soft failure. No wait here is without an end, and none ends the CUDA context.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/view.cuh"

namespace sgl_comm::device {

struct Start {
  unsigned long long epoch;
  uint32_t abort;
};

__device__ __forceinline__ Control* control_of(const GroupView& group, int rank) {
  return reinterpret_cast<Control*>(group.workspace[rank]);
}

// Before: wait_for_previous_kernel(). Returns the epoch of this launch, alike in all its threads, and the abort word.
__device__ __forceinline__ Start read_start(const GroupView& group) {
  const ulonglong2 pair = ptx::load_pair(group.workspace[group.rank]);
  return {pair.x / kEpoch, static_cast<uint32_t>(pair.y)};
}

// Once a block, when none of its threads will read the epoch again. Needs all threads of the block.
__device__ __forceinline__ void advance_epoch(const GroupView& group) {
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(&control_of(group, group.rank)->counter, blockIdx.x == 0 ? kEpoch - (gridDim.x - 1) : 1ull);
  }
}

// Marks the group as failed: here, at every peer, and in the host's memory.
// Inlined like all of the kernels' code: a call, though never made, would give them a stack, which costs 0.25 us.
__device__ __forceinline__ void fail_group(const GroupView& group, int world, int missing, uint32_t op,
                                           unsigned long long epoch) {
  const AbortCode code{static_cast<uint32_t>(group.rank), static_cast<uint32_t>(missing), 0};
  Control* own = control_of(group, group.rank);
  atomicCAS_system(&own->abort, 0u, code.packed());
  if (atomicExch(&own->fault_claimed, 1u) != 0) return;
  const uint32_t abort = ptx::load_relaxed_sys_u32(&own->abort);
  volatile Fault* fault = group.fault;
  fault->abort = abort;
  fault->op = op;
  fault->block = blockIdx.x;
  fault->epoch = epoch;
  __threadfence_system();
  fault->written = 1;
#pragma unroll 1
  for (int peer = 0; peer < world; ++peer) {
    if (peer != group.rank) ptx::store_relaxed_sys_u32(&control_of(group, peer)->abort, abort);
  }
}

// Asked now and then by a thread that waits: time to give up? Reads the clock and the rank's own abort word; after a
// millisecond also the host's, once a millisecond and by one thread a warp.
class Patience {
 public:
  __device__ __forceinline__ bool exhausted(const GroupView& group) {
    const uint32_t now = static_cast<uint32_t>(ptx::nanoseconds() >> 20);
    if (!started_) {
      started_ = true;
      since_ = last_look_ = now;
      return false;
    }
    if (ptx::load_relaxed_sys_u32(&control_of(group, group.rank)->abort) != 0) return true;
    if (now == last_look_) return false;
    last_look_ = now;
    const uint32_t active = __activemask();
    if (threadIdx.x % 32 == __ffs(active) - 1) {
      const uint32_t abort = *const_cast<const volatile uint32_t*>(&group.host_abort->abort);
      if (abort != 0) atomicCAS_system(&control_of(group, group.rank)->abort, 0u, abort);
    }
    return now - since_ > group.timeout_ticks;
  }

 private:
  uint32_t since_, last_look_;
  bool started_ = false;
};

}  // namespace sgl_comm::device
