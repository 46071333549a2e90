// The push protocol: data is the signal. A sender stores packs straight into the peers' workspaces; a receiver polls
// its own until no word is the sentinel. What was read is emptied (set back to the sentinel): by the next launch, while
// that waits for its own data; or, where the message is large or goes through a ring (ring.cuh), at once by the thread
// that polled it.
//
// Who writes what, when. A workspace has three banks, which launches take in turn, on every rank alike. A place of rank
// p's bank is written by one thread of one peer, polled by threads of rank p in the same epoch e, and emptied by
// threads of rank p in epoch e or e + 1. Why reuse is safe. Rank r writes in epoch e + 3 only after its kernel of e + 2
// has ended, so after it received e + 2 from p; and p sent that only after p's kernel of e + 1 had ended, with every
// place of e emptied. The end of a kernel and the wait for it (griddepcontrol.wait) are the release and acquire. It
// needs every launch to wait for every peer: one that does not (a broadcast) has no place in these banks.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/view.cuh"
#include "cuda/device/wait.cuh"

namespace sgl_comm::device {

// What a kernel knows of a push workspace: the group, and how large each bank is.
struct PushView {
  GroupView group;
  uint32_t bank_bytes;  // what a launch leaves full is counted in packs, of which a word holds 2^30
};

// Where bank `bank` begins in rank `rank`'s workspace.
__device__ __forceinline__ uint8_t* bank_of(const PushView& view, int rank, uint32_t bank) {
  return view.group.workspace[rank] + (kControlBytes + uint64_t{bank} * view.bank_bytes);
}

// A rank sends itself nothing: the peers of rank `receiver`, in order.
__host__ __device__ __forceinline__ int place_of_sender(int sender, int receiver) {
  return sender - (sender > receiver ? 1 : 0);
}

// Empties what the previous launch left full: pack `first`, `first + stride`, ...; together all of it.
__device__ __forceinline__ void empty_previous(const PushView& view, const Start& start, uint32_t first,
                                               uint32_t stride) {
  uint4* const bank = reinterpret_cast<uint4*>(bank_of(view, view.group.rank, start.previous_bank));
#pragma unroll 1
  for (uint32_t i = first; i < start.packs_to_empty; i += stride) bank[i] = sentinel_pack();
}

// Before: this sender's place, `offset` bytes into what each peer keeps for a sender, is empty. After: it is, or soon
// will be, full. No word of `pack` may be the sentinel. Senders are `stride` bytes apart.
template <int kWorld>
__device__ __forceinline__ void push_to_peers(const PushView& view, uint32_t bank, uint32_t stride, uint32_t offset,
                                              uint4 pack) {
#pragma unroll
  for (int peer = 0; peer < kWorld; ++peer) {
    if (peer == view.group.rank) continue;
    ptx::store_relaxed_sys(bank_of(view, peer, bank) + (place_of_sender(view.group.rank, peer) * stride + offset),
                           pack);
  }
}

// Waits for the pack at `place`, a sum of rank `sender`.
__device__ __forceinline__ Trouble await_pack(const GroupView& group, const uint8_t* place, int sender, uint4& pack) {
  const auto incomplete = [&] {
    if (!any_sentinel(pack)) return false;
    pack = ptx::load_relaxed_sys(place);
    return true;
  };
  pack = ptx::load_relaxed_sys(place);
  return await(group, incomplete, true) ? kFine : sender;
}

// Waits for a pack of every peer, those of neighbours `stride` bytes apart; packs[rank] is left alone. Returns kFine or
// the first rank that did not come.
template <int kWorld>
__device__ __forceinline__ Trouble await_peers(const GroupView& group, const uint8_t* places, uint32_t stride,
                                               uint4 (&packs)[kWorld], bool indirect = false) {
  const int rank = ptx::in_register(group.rank);
  const auto load = [&](int r) { return ptx::load_relaxed_sys(places + place_of_sender(r, rank) * stride); };
#pragma unroll
  for (int r = 0; r < kWorld; ++r) {
    if (r != rank) packs[r] = load(r);
  }
  const auto incomplete = [&] {
    bool any = false;
#pragma unroll
    for (int r = 0; r < kWorld; ++r) {
      if (r != rank && any_sentinel(packs[r])) {
        packs[r] = load(r);
        any = true;
      }
    }
    return any;
  };
  if (await(group, incomplete, indirect)) return kFine;
  Trouble missing = 0;
#pragma unroll
  for (int r = kWorld - 1; r >= 0; --r) {
    if (r != rank && any_sentinel(packs[r])) missing = r;
  }
  return missing;
}

// Empties places that this very thread has polled.
template <int kWorld>
__device__ __forceinline__ void empty_places(uint8_t* places, uint32_t stride) {
#pragma unroll
  for (int p = 0; p < kWorld - 1; ++p) *reinterpret_cast<uint4*>(places + p * stride) = sentinel_pack();
}

// Receives every peer's pack (see await_peers) and sums them with this rank's own, in rank order.
template <typename T, int kWorld>
__device__ __forceinline__ Trouble receive_and_sum(const GroupView& group, const uint8_t* places, uint32_t stride,
                                                   uint4 own, uint4& sum) {
  uint4 packs[kWorld];
#pragma unroll
  for (int r = 0; r < kWorld; ++r) packs[r] = own;
  const Trouble trouble = await_peers<kWorld>(group, places, stride, packs);
  sum = sum_in_order<T>(packs);
  return trouble;
}

}  // namespace sgl_comm::device
