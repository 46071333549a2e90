// The push protocol: data is the signal. A sender stores packs straight into the peers' workspaces; a receiver polls
// its own until no word is the sentinel. What was read is emptied (set back to the sentinel): by the next launch, while
// that waits for its own data; or, where the message is large or goes through a ring (ring.cuh), at once by the thread
// that polled it.
//
// Who writes what, when. A workspace has three banks, of which each launch takes one, on every rank the same. A place
// of rank p's bank is written by one thread of one peer, polled by threads of rank p in the same epoch e, and emptied
// by threads of rank p in epoch e (what is emptied at once) or e + 1. Which bank: that of the launch before the last,
// if that one emptied it at once; else the one that neither of the last two used. So a bank used in epoch e and emptied
// in epoch e is used again in e + 2 at the earliest; one emptied in epoch e + 1, in e + 3.
//
// Why reuse is safe. Rank r writes in epoch f only after its kernel of f - 1 has ended, so after it received f - 1 from
// p; and p sent that only after p's kernel of f - 2 had ended, with every place emptied that it was to empty. The end
// of a kernel and the wait for it (griddepcontrol.wait) are the release and acquire. It needs every launch to wait for
// every peer: one that does not (a broadcast) has no place in these banks. And it needs all ranks to agree on whether a
// launch leaves its bank full, since they choose the next banks by that.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/parameters.h"
#include "cuda/device/wait.cuh"

namespace sgl_comm::device {

// How many ranks the group has. Ranks that there are not have no workspace.
template <int kWorld>
__device__ __forceinline__ int world_of(const GroupView& group) {
  if constexpr (kWorld != kShared) {
    return kWorld;
  } else {
    int world = kFewestShared;
#pragma unroll
    for (int r = kFewestShared; r < kMostShared; ++r) world += group.workspace[r] != nullptr ? 1 : 0;
    return world;
  }
}

// Whether there is a rank of this number, and a peer at this place of any rank. Neither is asked of the fewest there
// are.
template <int kWorld>
__device__ __forceinline__ bool has_rank(const GroupView& group, int rank) {
  return kWorld != kShared || rank < kFewestShared || group.workspace[rank] != nullptr;
}
template <int kWorld>
__device__ __forceinline__ bool has_peer(const GroupView& group, int place) {
  return has_rank<kWorld>(group, place + 1);
}

// How far bank `bank` is from the first one, and where that begins in rank `rank`'s workspace.
__device__ __forceinline__ uint64_t bank_offset(const PushView& view, uint32_t bank) {
  return uint64_t{bank} * view.bank_bytes;
}
__device__ __forceinline__ uint8_t* banks_of(const PushView& view, int rank) {
  return view.group.workspace[rank] + kControlBytes + kCreditsBytes + kCountsBytes;
}

// A rank sends itself nothing: the peers of rank `receiver`, in order.
__host__ __device__ __forceinline__ int place_of_sender(int sender, int receiver) {
  return sender - (sender > receiver ? 1 : 0);
}
__host__ __device__ __forceinline__ int sender_at(int place, int receiver) {
  return place + (place >= receiver ? 1 : 0);
}

// What the peer at `place` of rank `rank` tells that rank's block of this number.
__device__ __forceinline__ unsigned long long* credit_of(const PushView& view, int rank, int place) {
  return reinterpret_cast<unsigned long long*>(view.group.workspace[rank] + kControlBytes +
                                               (place * kMostRingBlocks + blockIdx.x) * kCreditBytes);
}

// What rank `whose` tells rank `rank`'s block of this number; and where the places of broadcasts begin there.
__device__ __forceinline__ unsigned long long* count_of(const PushView& view, int rank, int whose) {
  return reinterpret_cast<unsigned long long*>(view.group.workspace[rank] + kControlBytes + kCreditsBytes +
                                               (whose * kMostBroadcastBlocks + blockIdx.x) * kCreditBytes);
}
__device__ __forceinline__ uint8_t* broadcast_places_of(const PushView& view, int rank) {
  return banks_of(view, rank) + bank_offset(view, kBanks);
}

// Empties what the previous launch left full: pack `first`, `first + stride`, ...; together all of it.
__device__ __forceinline__ void empty_previous(const PushView& view, const Start& start, uint32_t first,
                                               uint32_t stride) {
  const Baton baton = Baton::unpacked(start.baton);
  uint4* const bank =
      reinterpret_cast<uint4*>(banks_of(view, view.group.rank) + bank_offset(view, baton.previous_bank));
#pragma unroll 1
  for (uint32_t i = first; i < baton.packs_to_empty; i += stride) bank[i] = sentinel_pack();
}

// Where this rank's packs go: its part of the first bank of each peer. Senders' parts are `stride` bytes apart.
template <int kWorld>
class Peers {
 public:
  __device__ __forceinline__ Peers(const PushView& view, uint32_t stride) {
    const int rank = view.group.rank;
#pragma unroll
    for (int p = 0; p < kPeers<kWorld>; ++p) {
      if constexpr (kWorld == kShared) {
        parts_[p] = nullptr;
        if (!has_peer<kWorld>(view.group, p)) continue;
      }
      const int peer = sender_at(p, rank);
      parts_[p] = banks_of(view, peer) + place_of_sender(rank, peer) * stride;
    }
  }

  // Before: the place `offset` bytes into this rank's part of the first bank (into that of another: plus its
  // bank_offset) is empty at each peer. After: it is, or soon will be, full. No word of `pack` may be the sentinel.
  __device__ __forceinline__ void push(uint64_t offset, uint4 pack) const {
#pragma unroll
    for (int p = 0; p < kPeers<kWorld>; ++p) {
      if constexpr (kWorld == kShared) {
        if (p >= kFewestShared - 1 && parts_[p] == nullptr) continue;
      }
      ptx::store_relaxed_sys(parts_[p] + offset, pack);
    }
  }

  // For wait_for_previous_kernel().
  __device__ __forceinline__ uint64_t ready() const {
    uint64_t all = 0;
#pragma unroll
    for (int p = 0; p < kPeers<kWorld>; ++p) all |= reinterpret_cast<uint64_t>(parts_[p]);
    return all;
  }

 private:
  uint8_t* parts_[kPeers<kWorld>];  // null for a rank that there is not
};

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

// Loads those packs anew that are not there yet; false if there were none.
template <int kWorld>
__device__ __forceinline__ bool fetch_missing(const uint8_t* places, uint32_t stride, uint4 (&packs)[kPeers<kWorld>]) {
  bool any = false;
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if (any_sentinel(packs[p])) {
      packs[p] = ptx::load_relaxed_sys(places + p * stride);
      any = true;
    }
  }
  return any;
}

// A pack of every peer, in order, those of neighbours `stride` bytes apart, as far as they are there yet. Of ranks that
// there are not: zeros, which nobody waits for.
template <int kWorld>
__device__ __forceinline__ void fetch_peers(const GroupView& group, const uint8_t* places, uint32_t stride,
                                            uint4 (&packs)[kPeers<kWorld>]) {
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if constexpr (kWorld == kShared) {
      packs[p] = ptx::load_relaxed_sys_if(places + p * stride, has_peer<kWorld>(group, p));
    } else {
      packs[p] = ptx::load_relaxed_sys(places + p * stride);
    }
  }
}

// Polls with two loads under way, `pack` and `other`; false if it has not seen the pack after the quick polls. What is
// gained, and why poll_peers() begins with two and poll_fetched() with one, is in docs/thresholds.md.
__device__ __forceinline__ bool poll_in_turn(const uint8_t* place, uint4& pack, uint4 other) {
#pragma unroll 1
  for (int polls = 0; polls < kQuickPolls; polls += 2) {
    if (!any_sentinel(pack)) return true;
    pack = ptx::load_relaxed_sys(place);
    if (!any_sentinel(other)) {
      pack = other;
      return true;
    }
    other = ptx::load_relaxed_sys(place);
  }
  return false;
}

// Polls for those packs that fetch_peers() has not found; false if some are still missing after the quick polls.
template <int kWorld>
__device__ __forceinline__ bool poll_fetched(const uint8_t* places, uint32_t stride, uint4 (&packs)[kPeers<kWorld>]) {
  if constexpr (kWorld == 2) {
    if (!any_sentinel(packs[0])) return true;
    packs[0] = ptx::load_relaxed_sys(places);
    return poll_in_turn(places, packs[0], ptx::load_relaxed_sys(places));
  } else {
    return poll_quickly([&] { return fetch_missing<kWorld>(places, stride, packs); });
  }
}

// Polls for a pack of every peer; false if some are still missing after the quick polls.
template <int kWorld>
__device__ __forceinline__ bool poll_peers(const GroupView& group, const uint8_t* places, uint32_t stride,
                                           uint4 (&packs)[kPeers<kWorld>]) {
  fetch_peers<kWorld>(group, places, stride, packs);
  if constexpr (kWorld == 2) {
    return poll_in_turn(places, packs[0], ptx::load_relaxed_sys(places));
  } else {
    return poll_fetched<kWorld>(places, stride, packs);
  }
}

// Waits for those packs that are still missing. Returns kFine or the first rank that did not come.
template <int kWorld>
__device__ __forceinline__ Trouble await_missing(const GroupView& group, const uint8_t* places, uint32_t stride,
                                                 uint4 (&packs)[kPeers<kWorld>], bool indirect = false) {
  if (poll_patiently(
          group, [&] { return fetch_missing<kWorld>(places, stride, packs); }, indirect))
    return kFine;
  int missing = 0;
#pragma unroll
  for (int p = kPeers<kWorld> - 1; p >= 0; --p) {
    if (any_sentinel(packs[p])) missing = p;
  }
  return sender_at(missing, group.rank);
}

// Waits for those packs that fetch_peers() has not found.
template <int kWorld>
__device__ __forceinline__ Trouble await_fetched(const GroupView& group, const uint8_t* places, uint32_t stride,
                                                 uint4 (&packs)[kPeers<kWorld>], bool indirect = false) {
  if (poll_fetched<kWorld>(places, stride, packs)) return kFine;
  return await_missing<kWorld>(group, places, stride, packs, indirect);
}

// Waits for a pack of every peer.
template <int kWorld>
__device__ __forceinline__ Trouble await_peers(const GroupView& group, const uint8_t* places, uint32_t stride,
                                               uint4 (&packs)[kPeers<kWorld>], bool indirect = false) {
  fetch_peers<kWorld>(group, places, stride, packs);
  return await_fetched<kWorld>(group, places, stride, packs, indirect);
}

// Empties places that this very thread has polled.
template <int kWorld>
__device__ __forceinline__ void empty_places(const GroupView& group, uint8_t* places, uint32_t stride) {
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if (has_peer<kWorld>(group, p)) *reinterpret_cast<uint4*>(places + p * stride) = sentinel_pack();
  }
}

// The packs of all peers and this rank's own, summed in rank order.
template <typename T, int kWorld>
__device__ __forceinline__ uint4 sum_of_peers(const GroupView& group, const uint4 (&received)[kPeers<kWorld>],
                                              uint4 own, int rank) {
  return sum_in_order<T>(received, own, rank, [&](int place) { return has_peer<kWorld>(group, place); });
}

// Receives every peer's pack (see await_peers) and sums them with this rank's own, in rank order.
template <typename T, int kWorld>
__device__ __forceinline__ Trouble receive_and_sum(const GroupView& group, const uint8_t* places, uint32_t stride,
                                                   uint4 own, uint4& sum) {
  uint4 received[kPeers<kWorld>];
  const Trouble trouble = await_peers<kWorld>(group, places, stride, received);
  sum = sum_of_peers<T, kWorld>(group, received, own, group.rank);
  return trouble;
}

}  // namespace sgl_comm::device
