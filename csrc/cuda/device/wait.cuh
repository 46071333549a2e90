// Epochs, timeouts and soft failure. Every wait here ends, and none ends the CUDA context.
#pragma once

#include "cuda/device/ptx.cuh"
#include "cuda/device/view.h"

namespace sgl_comm::device {

// How a launch is going, for one thread: kOk, the rank that did not come, or one of the codes below.
using Status = int;
constexpr Status kOk = -1;
constexpr Status kFailedBefore = 0x100;  // the abort word was set when the launch began
constexpr Status kOverlap = 0x101;       // another launch of this communicator runs on this rank
constexpr Status kUnregistered = 0x102;  // a captured call whose peers' addresses have not been filled in

struct Start {
  unsigned long long started;  // the low bits count the blocks that had added to it before
  uint32_t buffer_state;
  uint32_t abort;

  __device__ __forceinline__ unsigned long long epoch() const { return started / kEpoch; }
  __device__ __forceinline__ uint32_t buffer() const { return BufferState::unpacked(buffer_state).buffer; }
  __device__ __forceinline__ bool previous_ended() const {
    return BufferState::unpacked(buffer_state).epoch == BufferState::last_bits(epoch());
  }
  __device__ __forceinline__ Status status() const {
    return abort != 0 ? kFailedBefore : previous_ended() ? kOk : kOverlap;
  }
};

__device__ __forceinline__ Control* control_of(const GroupView& group, int rank) {
  return reinterpret_cast<Control*>(group.workspace[rank]);
}

// Reads the Control at the start of a launch. Before: wait_for_previous_kernel(). Needs all threads of the block. Every
// thread of the launch gets the same answer, but for whether the group has failed. kPerBlock: one thread reads for its
// block, which is better where there are many large blocks; else each warp reads for itself, which is quicker.
template <bool kPerBlock>
__device__ __forceinline__ Start read_start(const GroupView& group) {
  uint4 words;
  if constexpr (kPerBlock) {
    __shared__ uint4 shared;
    if (threadIdx.x == 0) shared = ptx::load_relaxed_sys(group.workspace[group.rank]);
    __syncthreads();
    words = shared;
  } else {
    words = ptx::load_relaxed_sys(group.workspace[group.rank]);
  }
  return {static_cast<unsigned long long>(words.y) << 32 | words.x, words.w, words.z};
}

// What a block's first thread needs in leave() and knows already in enter().
struct LeaveState {
  Control* own;
  unsigned long long epoch;  // as it stands in `started`
  uint32_t most;             // of this launch, that can have been added
  uint32_t remainder;        // what others have added when this block's addition makes up kEpoch
  uint32_t next_buffer_state;
};
// What a block's first thread keeps from enter() to leave(). `before` is the answer of an atomic addition: as long as
// nobody reads it, nobody waits for it.
struct Entry {
  unsigned long long before;  // `started` when this block added to it
  LeaveState leave_state;
};

// Counts this block as started. Once a block, after read_start<kPerBlock>(). Needs all threads.
// next_buffer_state(state) is the state that this launch leaves to the next one.
template <bool kPerBlock, typename NextBufferState>
__device__ __forceinline__ Entry enter_with(const GroupView& group, const Start& start,
                                            NextBufferState&& next_buffer_state) {
  if (!kPerBlock) __syncthreads();  // all have read the start
  // Not set in other threads: the first would then wait for its addition's answer.
  Entry entry;
  if (threadIdx.x == 0) {
    const uint32_t others = gridDim.x - 1, all = static_cast<uint32_t>(kEpoch);
    const uint32_t addition = ptx::in_register(blockIdx.x == 0 ? all - others : 1);
    Control* const own = control_of(group, group.rank);
    entry.before = atomicAdd(&own->started, addition);
    entry.leave_state = {own, start.epoch() * kEpoch, ptx::in_register(blockIdx.x == 0 ? others : all - 1),
                         all - addition,
                         ptx::in_register(next_buffer_state(BufferState::unpacked(start.buffer_state)).packed())};
  }
  return entry;
}

// enter_with() for a launch that uses a buffer and leaves `packs` packs of it full.
template <bool kPerBlock>
__device__ __forceinline__ Entry enter(const GroupView& group, const Start& start, uint32_t packs) {
  return enter_with<kPerBlock>(group, start, [&](const BufferState& state) { return state.next(packs); });
}

// Marks the group as failed: on this rank, at every peer, and in the host's memory.
// Inlined like all of the kernels' code: a call, though never made, would give them a stack, which costs 0.25 us.
__device__ __forceinline__ void fail_group(const GroupView& group, int world, Status status, Op op,
                                           unsigned long long epoch) {
  const bool a_rank = status < kMaxWorld;
  const AbortCode code{static_cast<uint32_t>(group.rank), static_cast<uint32_t>(a_rank ? status : group.rank),
                       status == kOverlap        ? AbortCode::kOverlap
                       : status == kUnregistered ? AbortCode::kUnregistered
                                                 : AbortCode::kTimeout};
  Control* own = control_of(group, group.rank);
  atomicCAS_system(&own->abort, 0u, code.packed());
  if (atomicExch(&own->fault_claimed, 1u) != 0) return;
  const uint32_t abort = ptx::load_relaxed_sys_u32(&own->abort);
  volatile Fault* fault = group.fault;
  fault->abort = abort;
  fault->op = static_cast<uint32_t>(op);
  fault->block = blockIdx.x;
  fault->epoch = epoch;
  __threadfence_system();
  fault->written = 1;
#pragma unroll 1
  for (int peer = 0; peer < world; ++peer) {
    if (peer != group.rank) ptx::store_relaxed_sys_u32(&control_of(group, peer)->abort, abort);
  }
}

// Ends the launch for this thread, once. False if another launch of the group ran on this rank at the same time.
//
// Whether blocks of two launches have read the same epoch e is always seen: of the launch that completes its kEpoch
// first, the last block to add finds another's addition in the counter; or there was none yet, and then every block of
// the other that has read e adds to a counter that has passed e. If the epochs are apart, read_start() has found that
// the block that completed the earlier one has not ended. Some other block may not have ended either, which is not
// seen; it may then wait in vain, until its deadline, or, of a broadcast, get what the other launch was to have.
__device__ __forceinline__ bool leave(const Entry& entry) {
  if (threadIdx.x != 0) return true;
  const LeaveState& leave_state = entry.leave_state;
  const unsigned long long added = entry.before - leave_state.epoch;  // by other blocks
  if (added == leave_state.remainder) leave_state.own->buffer_state = leave_state.next_buffer_state;
  return added <= leave_state.most;
}

// A wait begins with kQuickPolls polls of nothing but what is awaited, less than two milliseconds, in a loop of its
// own.
constexpr int kQuickPolls = 4096;
constexpr int kPollsBetweenLooks = 64;

// When a thread that waits longer must give up. Reads the clock and the rank's own abort word; after a millisecond also
// the host's, once a millisecond and by one thread a warp.
class Timeout {
 public:
  // indirect: what is awaited depends on a third rank, for which every rank waits too. A slightly later timeout here
  // lets those who miss that rank itself give up first, and name it.
  __device__ __forceinline__ Timeout(const GroupView& group, bool indirect)
      : timeout_ticks_(group.timeout_ticks + (indirect ? min(group.timeout_ticks / 16 + 8, 1024u) : 0u)) {}

  __device__ __forceinline__ bool reached(const GroupView& group) {
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
    return now - since_ > timeout_ticks_;
  }

 private:
  const uint32_t timeout_ticks_;
  uint32_t since_, last_look_;
  bool started_ = false;
};

// Polls until incomplete() is false. Returns false if it is still true after the quick polls.
template <typename Poll>
__device__ __forceinline__ bool poll_quickly(Poll&& incomplete) {
  int polls = 0;
#pragma unroll 1
  while (incomplete()) {
    if (++polls == kQuickPolls) return false;
  }
  return true;
}

// Polls until incomplete() is false. Returns false if the timeout has passed or the group has failed.
template <typename Poll>
__device__ __forceinline__ bool poll_until_timeout(const GroupView& group, Poll&& incomplete, bool indirect) {
  Timeout timeout(group, indirect);
  for (;;) {
#pragma unroll 1
    for (int poll = 0; poll < kPollsBetweenLooks; ++poll) {
      if (!incomplete()) return true;
    }
    if (timeout.reached(group)) return false;
  }
}

// Waits until incomplete() is false: quick polls first, then polls that heed the timeout. Returns false on failure.
template <typename Poll>
__device__ __forceinline__ bool await(const GroupView& group, Poll&& incomplete, bool indirect = false) {
  return poll_quickly(incomplete) || poll_until_timeout(group, incomplete, indirect);
}

}  // namespace sgl_comm::device
