// Epochs, deadlines and soft failure. No wait here is without an end, and none ends the CUDA context.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/view.cuh"

namespace sgl_comm::device {

// How a launch is going: kFine, the rank that did not come, or one of the others.
using Trouble = int;
constexpr Trouble kFine = -1;
constexpr Trouble kFailedBefore = 0x100;  // the abort word was set when the launch began
constexpr Trouble kOverlap = 0x101;       // another launch of this communicator runs on this rank
constexpr Trouble kUnregistered = 0x102;  // a captured call whose peers' addresses have not been filled in

struct Start {
  unsigned long long epoch;
  uint32_t bank;            // of this launch
  uint32_t previous_bank;   // of the launch before
  uint32_t packs_to_empty;  // at its start
  Trouble trouble;
};

__device__ __forceinline__ Control* control_of(const GroupView& group, int rank) {
  return reinterpret_cast<Control*>(group.workspace[rank]);
}

// Before: wait_for_previous_kernel(). Alike in all threads of the launch, but for the trouble.
__device__ __forceinline__ Start read_start(const GroupView& group) {
  const uint4 words = ptx::load_relaxed_sys(group.workspace[group.rank]);
  const unsigned long long epoch = (static_cast<unsigned long long>(words.y) << 32 | words.x) / kEpoch;
  const uint32_t last = (epoch & 1) == 0 ? words.w >> 16 : words.w & 0xffff, bank = last & 3;
  return {epoch, bank == kLastBank ? 0 : bank + 1, bank, (last >> 2) * kPacksPerCount,
          words.z != 0 ? kFailedBefore : kFine};
}

// What a block's first thread keeps from enter() to leave().
struct Entry {
  unsigned long long started;  // by which blocks, before this one
  unsigned long long ended;
};

// Once a block, when all its threads have read the start. Needs all of them. `packs` is how many packs of its bank the
// launch will leave full.
__device__ __forceinline__ Entry enter(const GroupView& group, const Start& start, uint32_t packs) {
  __syncthreads();
  if (threadIdx.x != 0) return {};
  Control* own = control_of(group, group.rank);
  Entry entry{0, start.epoch};
  if (blockIdx.x == 0) {
    entry.ended = *static_cast<volatile unsigned long long*>(&own->ended);
    own->last[start.epoch & 1] = packed_last(start.bank, packs);
  }
  entry.started = atomicAdd(&own->started, blockIdx.x == 0 ? kEpoch - (gridDim.x - 1) : 1ull);
  return entry;
}

// Marks the group as failed: here, at every peer, and in the host's memory.
// Inlined like all of the kernels' code: a call, though never made, would give them a stack, which costs 0.25 us.
__device__ __forceinline__ void fail_group(const GroupView& group, int world, Trouble trouble, Op op,
                                           unsigned long long epoch) {
  const bool a_rank = trouble < kMaxRanks;
  const AbortCode code{static_cast<uint32_t>(group.rank), static_cast<uint32_t>(a_rank ? trouble : group.rank),
                       trouble == kOverlap        ? AbortCode::kOverlap
                       : trouble == kUnregistered ? AbortCode::kUnregistered
                                                  : AbortCode::kTimeout};
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

// Once a thread, at its end. Fails the group if another launch of it ran on this rank at the same time.
//
// Whether blocks of two launches have read the same epoch e is always seen: of the launch that completes its kEpoch
// first, the last block to add finds another's addition in the counter; or there was none yet, and then every block of
// the other that has read e adds to a counter that has passed e. If the epochs are apart, the later launch's block 0
// finds that the last block of the one before has not ended. Some other block may not have ended either, which is not
// seen; it may then wait in vain, until its deadline.
__device__ __forceinline__ void leave(const GroupView& group, int world, const Start& start, const Entry& entry,
                                      Op op) {
  if (threadIdx.x != 0) return;
  const unsigned long long others = entry.started - start.epoch * kEpoch;
  const bool overlap = blockIdx.x == 0 ? others >= gridDim.x || entry.ended < start.epoch : others >= kEpoch;
  if (overlap) fail_group(group, world, kOverlap, op, start.epoch);
  if (blockIdx.x == gridDim.x - 1) control_of(group, group.rank)->ended = start.epoch + 1;
}

// A wait begins with so many polls of nothing but what is awaited, less than two milliseconds, in a loop of its own.
constexpr int kQuickPolls = 4096;
constexpr int kPollsBetweenLooks = 64;

// Asked now and then by a thread that waits longer: time to give up? Reads the clock and the rank's own abort word;
// after a millisecond also the host's, once a millisecond and by one thread a warp.
class Patience {
 public:
  // indirect: what is awaited depends on a third rank, for which every rank waits too. A little more patience here lets
  // those who miss that rank itself give up first, and name it.
  __device__ __forceinline__ Patience(const GroupView& group, bool indirect)
      : limit_(group.timeout_ticks + (indirect ? min(group.timeout_ticks / 16 + 8, 1024u) : 0u)) {}

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
    return now - since_ > limit_;
  }

 private:
  const uint32_t limit_;
  uint32_t since_, last_look_;
  bool started_ = false;
};

// Polls until incomplete() is false; false if it is time to give up.
template <typename Poll>
__device__ __forceinline__ bool await(const GroupView& group, Poll&& incomplete, bool indirect = false) {
#pragma unroll 1
  for (int poll = 0; poll < kQuickPolls; ++poll) {
    if (!incomplete()) return true;
  }
  Patience patience(group, indirect);
  for (;;) {
#pragma unroll 1
    for (int poll = 0; poll < kPollsBetweenLooks; ++poll) {
      if (!incomplete()) return true;
    }
    if (patience.exhausted(group)) return false;
  }
}

}  // namespace sgl_comm::device
