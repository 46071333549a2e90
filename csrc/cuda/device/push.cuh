// The push protocol, of the kind that TensorRT-LLM and FlashInfer call a Lamport-style all-reduce (after L. Lamport,
// Concurrent Reading and Writing, Communications of the ACM 20(11), 1977): the data is its own flag. A sender stores
// packs straight into the peers' workspaces; a receiver polls its own until no word is the sentinel. A slot that was
// read is emptied (set back to the sentinel): by the next launch, while that waits for its own data; or, where the
// message is large or goes through a ring (ring.cuh), at once by the thread that polled it.
//
// Who writes what, when. A workspace has three buffers, of which each launch uses one, on every rank the same. A buffer
// is divided into slots of one pack. A slot of rank p's buffer is written by one thread of one peer, polled by threads
// of rank p in the same epoch e, and emptied by threads of rank p in epoch e (what is emptied at once) or e + 1. A
// launch uses the buffer of the launch before the last, if that one emptied it at once; else the one that neither of
// the last two used. So a buffer used in epoch e and emptied in epoch e is used again in e + 2 at the earliest; one
// emptied in epoch e + 1, in e + 3.
//
// Why reuse is safe. Rank r writes in epoch f only after its kernel of f - 1 has ended, so after it received f - 1 from
// p; and p sent that only after p's kernel of f - 2 had ended, with every slot emptied that it was to empty. The end
// of a kernel and the wait for it (griddepcontrol.wait) are the release and acquire. It needs every launch to wait for
// every peer: one that does not (a broadcast) must not use these buffers. And it needs all ranks to agree on whether a
// launch leaves its buffer full, since they choose the next buffers by that.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/parameters.h"
#include "cuda/device/wait.cuh"

namespace sgl_comm::device {

// How many ranks the group has. In a kernel that serves several worlds, ranks beyond the last have no workspace.
template <int kWorld>
__device__ __forceinline__ int world_of(const GroupView& group) {
  if constexpr (kWorld != kSharedWorld) {
    return kWorld;
  } else {
    int world = kFewestShared;
#pragma unroll
    for (int r = kFewestShared; r < kMostShared; ++r) world += group.workspace[r] != nullptr ? 1 : 0;
    return world;
  }
}

// Whether the group has a rank of this number, and whether each of its ranks has a peer of this index (see
// sender_index). The fewest ranks that there can be are not looked up.
template <int kWorld>
__device__ __forceinline__ bool has_rank(const GroupView& group, int rank) {
  return kWorld != kSharedWorld || rank < kFewestShared || group.workspace[rank] != nullptr;
}
template <int kWorld>
__device__ __forceinline__ bool has_peer(const GroupView& group, int index) {
  return has_rank<kWorld>(group, index + 1);
}

// How far a buffer is from the first one, and where the first one begins in rank `rank`'s workspace.
__device__ __forceinline__ uint64_t buffer_offset(const PushView& view, uint32_t buffer) {
  return uint64_t{buffer} * view.buffer_bytes;
}
__device__ __forceinline__ uint8_t* buffers_of(const PushView& view, int rank) {
  return view.group.workspace[rank] + kControlBytes + kCreditsBytes + kCountsBytes;
}

// A rank sends itself nothing, so a receiver's senders are numbered without it: the index of a sender, and back.
__host__ __device__ __forceinline__ int sender_index(int sender, int receiver) {
  return sender - (sender > receiver ? 1 : 0);
}
__host__ __device__ __forceinline__ int sender_at(int index, int receiver) {
  return index + (index >= receiver ? 1 : 0);
}

// The credit that the peer of this index gives to rank `rank`'s block of this block's number.
__device__ __forceinline__ unsigned long long* credit_of(const PushView& view, int rank, int peer_index) {
  return reinterpret_cast<unsigned long long*>(view.group.workspace[rank] + kControlBytes +
                                               (peer_index * kMostRingBlocks + blockIdx.x) * kCreditBytes);
}

// The count of tiles that rank `whose` publishes to rank `rank`'s block of this block's number (broadcast.cu); and
// where the slots of broadcasts begin in that rank's workspace.
__device__ __forceinline__ unsigned long long* count_of(const PushView& view, int rank, int whose) {
  return reinterpret_cast<unsigned long long*>(view.group.workspace[rank] + kControlBytes + kCreditsBytes +
                                               (whose * kMostBroadcastBlocks + blockIdx.x) * kCreditBytes);
}
__device__ __forceinline__ uint8_t* broadcast_slots_of(const PushView& view, int rank) {
  return buffers_of(view, rank) + buffer_offset(view, kBuffers);
}

// Empties what the previous launch left full: pack `first`, `first + stride`, ...; together all of it.
__device__ __forceinline__ void empty_previous(const PushView& view, const Start& start, uint32_t first,
                                               uint32_t stride) {
  const BufferState state = BufferState::unpacked(start.buffer_state);
  uint4* const buffer =
      reinterpret_cast<uint4*>(buffers_of(view, view.group.rank) + buffer_offset(view, state.previous_buffer));
#pragma unroll 1
  for (uint32_t i = first; i < state.packs_to_empty; i += stride) buffer[i] = sentinel_pack();
}

// Where this rank's packs go: its part of the first buffer at each peer. The parts of neighbouring senders are `stride`
// bytes apart.
template <int kWorld>
class Peers {
 public:
  __device__ __forceinline__ Peers(const PushView& view, uint32_t stride) {
    const int rank = view.group.rank;
#pragma unroll
    for (int p = 0; p < kPeers<kWorld>; ++p) {
      if constexpr (kWorld == kSharedWorld) {
        parts_[p] = nullptr;
        if (!has_peer<kWorld>(view.group, p)) continue;
      }
      const int peer = sender_at(p, rank);
      parts_[p] = buffers_of(view, peer) + sender_index(rank, peer) * stride;
    }
  }

  // Stores a pack into a slot at each peer: the one `offset` bytes into this rank's part of the first buffer; for
  // another buffer, add its buffer_offset. Before: the slot is empty. After: it is, or soon will be, full. No word of
  // `pack` may be the sentinel.
  __device__ __forceinline__ void push(uint64_t offset, uint4 pack) const {
#pragma unroll
    for (int p = 0; p < kPeers<kWorld>; ++p) {
      if constexpr (kWorld == kSharedWorld) {
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
  uint8_t* parts_[kPeers<kWorld>];  // null beyond the last peer
};

// Waits for the pack in `slot`, a sum of rank `sender`.
__device__ __forceinline__ Status await_pack(const GroupView& group, const uint8_t* slot, int sender, uint4& pack) {
  const auto incomplete = [&] {
    if (!any_sentinel(pack)) return false;
    pack = ptx::load_relaxed_sys(slot);
    return true;
  };
  pack = ptx::load_relaxed_sys(slot);
  return await(group, incomplete, true) ? kOk : sender;
}

// Loads again those packs that were not complete; false if all were.
template <int kWorld>
__device__ __forceinline__ bool fetch_missing(const uint8_t* slots, uint32_t stride, uint4 (&packs)[kPeers<kWorld>]) {
  bool any = false;
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if (any_sentinel(packs[p])) {
      packs[p] = ptx::load_relaxed_sys(slots + p * stride);
      any = true;
    }
  }
  return any;
}

// Loads a pack of every peer, in order, from slots `stride` bytes apart; some may not be complete yet. Beyond the last
// peer it gives zeros, for which nobody waits.
template <int kWorld>
__device__ __forceinline__ void fetch_peers(const GroupView& group, const uint8_t* slots, uint32_t stride,
                                            uint4 (&packs)[kPeers<kWorld>]) {
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if constexpr (kWorld == kSharedWorld) {
      packs[p] = ptx::load_relaxed_sys_if(slots + p * stride, has_peer<kWorld>(group, p));
    } else {
      packs[p] = ptx::load_relaxed_sys(slots + p * stride);
    }
  }
}

// Polls with two loads under way, `pack` and `other`; false if it has not seen the pack after the quick polls.
// docs/thresholds.md says what is gained, and why poll_peers() begins with two and poll_fetched() with one.
__device__ __forceinline__ bool poll_in_turn(const uint8_t* slot, uint4& pack, uint4 other) {
#pragma unroll 1
  for (int polls = 0; polls < kQuickPolls; polls += 2) {
    if (!any_sentinel(pack)) return true;
    pack = ptx::load_relaxed_sys(slot);
    if (!any_sentinel(other)) {
      pack = other;
      return true;
    }
    other = ptx::load_relaxed_sys(slot);
  }
  return false;
}

// Polls for those packs that fetch_peers() found incomplete; false if some are still missing after the quick polls.
template <int kWorld>
__device__ __forceinline__ bool poll_fetched(const uint8_t* slots, uint32_t stride, uint4 (&packs)[kPeers<kWorld>]) {
  if constexpr (kWorld == 2) {
    if (!any_sentinel(packs[0])) return true;
    packs[0] = ptx::load_relaxed_sys(slots);
    return poll_in_turn(slots, packs[0], ptx::load_relaxed_sys(slots));
  } else {
    return poll_quickly([&] { return fetch_missing<kWorld>(slots, stride, packs); });
  }
}

// Polls for a pack of every peer; false if some are still missing after the quick polls.
template <int kWorld>
__device__ __forceinline__ bool poll_peers(const GroupView& group, const uint8_t* slots, uint32_t stride,
                                           uint4 (&packs)[kPeers<kWorld>]) {
  fetch_peers<kWorld>(group, slots, stride, packs);
  if constexpr (kWorld == 2) {
    return poll_in_turn(slots, packs[0], ptx::load_relaxed_sys(slots));
  } else {
    return poll_fetched<kWorld>(slots, stride, packs);
  }
}

// Waits for those packs that are still missing, until the timeout. Returns kOk or the first rank that did not come.
template <int kWorld>
__device__ __forceinline__ Status await_missing(const GroupView& group, const uint8_t* slots, uint32_t stride,
                                                uint4 (&packs)[kPeers<kWorld>], bool indirect = false) {
  if (poll_until_timeout(
          group, [&] { return fetch_missing<kWorld>(slots, stride, packs); }, indirect))
    return kOk;
  int missing = 0;
#pragma unroll
  for (int p = kPeers<kWorld> - 1; p >= 0; --p) {
    if (any_sentinel(packs[p])) missing = p;
  }
  return sender_at(missing, group.rank);
}

// Waits for those packs that fetch_peers() found incomplete.
template <int kWorld>
__device__ __forceinline__ Status await_fetched(const GroupView& group, const uint8_t* slots, uint32_t stride,
                                                uint4 (&packs)[kPeers<kWorld>], bool indirect = false) {
  if (poll_fetched<kWorld>(slots, stride, packs)) return kOk;
  return await_missing<kWorld>(group, slots, stride, packs, indirect);
}

// Waits for a pack of every peer.
template <int kWorld>
__device__ __forceinline__ Status await_peers(const GroupView& group, const uint8_t* slots, uint32_t stride,
                                              uint4 (&packs)[kPeers<kWorld>], bool indirect = false) {
  fetch_peers<kWorld>(group, slots, stride, packs);
  return await_fetched<kWorld>(group, slots, stride, packs, indirect);
}

// Empties the slots that this very thread has polled.
template <int kWorld>
__device__ __forceinline__ void empty_slots(const GroupView& group, uint8_t* slots, uint32_t stride) {
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if (has_peer<kWorld>(group, p)) *reinterpret_cast<uint4*>(slots + p * stride) = sentinel_pack();
  }
}

// The packs of all peers and this rank's own, summed in rank order.
template <typename T, int kWorld>
__device__ __forceinline__ uint4 sum_of_peers(const GroupView& group, const uint4 (&received)[kPeers<kWorld>],
                                              uint4 own, int rank) {
  return sum_in_order<T>(received, own, rank, [&](int index) { return has_peer<kWorld>(group, index); });
}

// Receives every peer's pack (see await_peers) and sums them with this rank's own, in rank order.
template <typename T, int kWorld>
__device__ __forceinline__ Status receive_and_sum(const GroupView& group, const uint8_t* slots, uint32_t stride,
                                                  uint4 own, uint4& sum) {
  uint4 received[kPeers<kWorld>];
  const Status status = await_peers<kWorld>(group, slots, stride, received);
  sum = sum_of_peers<T, kWorld>(group, received, own, group.rank);
  return status;
}

}  // namespace sgl_comm::device
