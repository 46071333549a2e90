// Epochs, deadlines and soft failure. No wait here is without an end, and none ends the CUDA context.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/view.h"

namespace sgl_comm::device {

// How a launch is going: kFine, the rank that did not come, or one of the others.
using Trouble = int;
constexpr Trouble kFine = -1;
constexpr Trouble kFailedBefore = 0x100;  // the abort word was set when the launch began
constexpr Trouble kOverlap = 0x101;       // another launch of this communicator runs on this rank
constexpr Trouble kUnregistered = 0x102;  // a captured call whose peers' addresses have not been filled in

struct Start {
  unsigned long long started;  // of which the low bits are how many blocks had added before
  uint32_t baton;
  uint32_t abort;

  __device__ __forceinline__ unsigned long long epoch() const { return started / kEpoch; }
  __device__ __forceinline__ uint32_t bank() const { return Baton::unpacked(baton).bank; }
  __device__ __forceinline__ bool previous_ended() const {
    return Baton::unpacked(baton).epoch == Baton::last_bits(epoch());
  }
  __device__ __forceinline__ Trouble trouble() const {
    return abort != 0 ? kFailedBefore : previous_ended() ? kFine : kOverlap;
  }
};

__device__ __forceinline__ Control* control_of(const GroupView& group, int rank) {
  return reinterpret_cast<Control*>(group.workspace[rank]);
}

// Before: wait_for_previous_kernel(). Needs all threads of the block. Alike in all threads of the launch, but for
// whether the group has failed. kShared: one thread reads for its block, which is better where there are many large
// blocks; else each warp reads for itself, which is quicker.
template <bool kShared>
__device__ __forceinline__ Start read_start(const GroupView& group) {
  uint4 words;
  if constexpr (kShared) {
    __shared__ uint4 shared;
    if (threadIdx.x == 0) shared = ptx::load_relaxed_sys(group.workspace[group.rank]);
    __syncthreads();
    words = shared;
  } else {
    words = ptx::load_relaxed_sys(group.workspace[group.rank]);
  }
  return {static_cast<unsigned long long>(words.y) << 32 | words.x, words.w, words.z};
}

// What a block's first thread keeps from enter() to leave(), and knows at once.
struct Ending {
  Control* own;
  unsigned long long epoch;  // as it stands in `started`
  uint32_t most;             // of this launch, that can have been added
  uint32_t remainder;        // what others have added when this block's addition makes up kEpoch
  uint32_t next_baton;
};
// The same, and what an addition answers. Nothing waits for that as long as it is kept whole.
struct Entry {
  unsigned long long before;  // `started` when this block added to it
  Ending ending;
};

// Once a block, after read_start<kShared>(). Needs all threads. next_baton(baton) is what the launch leaves to the
// next.
template <bool kShared, typename NextBaton>
__device__ __forceinline__ Entry enter_with(const GroupView& group, const Start& start, NextBaton&& next_baton) {
  if (!kShared) __syncthreads();  // all have read the start
  // Not set in other threads: the first would then wait for its addition's answer.
  Entry entry;
  if (threadIdx.x == 0) {
    const uint32_t others = gridDim.x - 1, all = static_cast<uint32_t>(kEpoch);
    const uint32_t addition = ptx::in_register(blockIdx.x == 0 ? all - others : 1);
    Control* const own = control_of(group, group.rank);
    entry.before = atomicAdd(&own->started, addition);
    entry.ending = {own, start.epoch() * kEpoch, ptx::in_register(blockIdx.x == 0 ? others : all - 1), all - addition,
                    ptx::in_register(next_baton(Baton::unpacked(start.baton)).packed())};
  }
  return entry;
}

// The same of a launch that takes a bank and will leave so many of its packs full.
template <bool kShared>
__device__ __forceinline__ Entry enter(const GroupView& group, const Start& start, uint32_t packs) {
  return enter_with<kShared>(group, start, [&](const Baton& baton) { return baton.next(packs); });
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

// Once a thread, at its end. False if another launch of the group ran on this rank at the same time.
//
// Whether blocks of two launches have read the same epoch e is always seen: of the launch that completes its kEpoch
// first, the last block to add finds another's addition in the counter; or there was none yet, and then every block of
// the other that has read e adds to a counter that has passed e. If the epochs are apart, read_start() has found that
// the block that completed the earlier one has not ended. Some other block may not have ended either, which is not
// seen; it may then wait in vain, until its deadline, or, of a broadcast, get what the other launch was to have.
__device__ __forceinline__ bool leave(const Entry& entry) {
  if (threadIdx.x != 0) return true;
  const Ending& ending = entry.ending;
  const unsigned long long added = entry.before - ending.epoch;  // by other blocks
  if (added == ending.remainder) ending.own->baton = ending.next_baton;
  return added <= ending.most;
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

// Polls until incomplete() is false; false if it still is not after the quick polls.
template <typename Poll>
__device__ __forceinline__ bool poll_quickly(Poll&& incomplete) {
  int polls = 0;
#pragma unroll 1
  while (incomplete()) {
    if (++polls == kQuickPolls) return false;
  }
  return true;
}

// Polls until incomplete() is false; false if it is time to give up.
template <typename Poll>
__device__ __forceinline__ bool poll_patiently(const GroupView& group, Poll&& incomplete, bool indirect) {
  Patience patience(group, indirect);
  for (;;) {
#pragma unroll 1
    for (int poll = 0; poll < kPollsBetweenLooks; ++poll) {
      if (!incomplete()) return true;
    }
    if (patience.exhausted(group)) return false;
  }
}

// The one, then the other.
template <typename Poll>
__device__ __forceinline__ bool await(const GroupView& group, Poll&& incomplete, bool indirect = false) {
  return poll_quickly(incomplete) || poll_patiently(group, incomplete, indirect);
}

}  // namespace sgl_comm::device
