// The push protocol: data is the signal. A sender stores packs straight into the peers' slots; a receiver polls its own
// slots until no word is the sentinel, and puts the sentinel back.
//
// Who writes what, when. In epoch e, half e & 1 of rank p's workspace: slot(r) is written by rank r, by the thread that
// owns the pack; it is polled, read and set back to the sentinel by the thread of rank p with the same place.
// Why reuse is safe. Rank r writes epoch e + 2 only after its kernel of e + 1 has ended, so after it received e + 1
// from p; and p sent that only after p's kernel of e had ended, with every sentinel of e put back. The end of a kernel
// and the wait for it (griddepcontrol.wait) are the release and acquire.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/view.cuh"
#include "cuda/device/wait.cuh"

namespace sgl_comm::device {

// Before: slot `offset` of this rank is empty at every peer. After: it is, or soon will be, full.
template <int kWorld>
__device__ __forceinline__ void push_to_peers(const GroupView& group, unsigned long long epoch, int64_t offset,
                                              uint4 own) {
  const uint4 sent = without_sentinel(own);
#pragma unroll
  for (int peer = 0; peer < kWorld; ++peer) {
    if (peer == group.rank) continue;
    ptx::store_relaxed_sys(slot(group.workspace[peer], group.slot_bytes, kWorld, epoch, group.rank) + offset, sent);
  }
}

// Waits for every peer's pack at `offset`; packs[rank] is the caller's own. Returns the rank that did not come, or -1.
template <int kWorld>
__device__ __forceinline__ int await_peers(const GroupView& group, const uint8_t* slots, uint4 (&packs)[kWorld]) {
#pragma unroll
  for (int r = 0; r < kWorld; ++r) {
    if (r != group.rank) packs[r] = ptx::load_relaxed_sys(slots + r * group.slot_bytes);
  }
  const auto incomplete = [&] {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kWorld; ++r) {
      if (r != group.rank && any_sentinel(packs[r])) {
        packs[r] = ptx::load_relaxed_sys(slots + r * group.slot_bytes);
        any = true;
      }
    }
    return any;
  };
  Patience patience;
  for (;;) {
#pragma unroll 1
    for (int poll = 0; poll < 64; ++poll) {
      if (!incomplete()) return -1;
    }
    if (patience.exhausted(group)) break;
  }
  int missing = 0;
#pragma unroll
  for (int r = kWorld - 1; r >= 0; --r) {
    if (r != group.rank && any_sentinel(packs[r])) missing = r;
  }
  return missing;
}

template <int kWorld>
__device__ __forceinline__ void empty_slots(const GroupView& group, uint8_t* slots) {
#pragma unroll
  for (int r = 0; r < kWorld; ++r) {
    if (r != group.rank) *reinterpret_cast<uint4*>(slots + r * group.slot_bytes) = sentinel_pack();
  }
}

// Receives every peer's pack at `offset`, sums in rank order and empties the slots. Before: this rank's pack has been
// pushed. Returns the rank that did not come, or -1.
template <typename T, int kWorld>
__device__ __forceinline__ int receive_and_sum(const GroupView& group, unsigned long long epoch, int64_t offset,
                                               uint4 own, uint4& sum) {
  uint8_t* slots = slot(group.workspace[group.rank], group.slot_bytes, kWorld, epoch, 0) + offset;
  uint4 packs[kWorld];
#pragma unroll
  for (int r = 0; r < kWorld; ++r) packs[r] = own;
  const int missing = await_peers<kWorld>(group, slots, packs);
  sum = sum_in_order<T>(packs);
  empty_slots<kWorld>(group, slots);
  return missing;
}

}  // namespace sgl_comm::device
