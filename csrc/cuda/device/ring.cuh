// The ring: a message of any size through a buffer of bounded size, within one epoch.
//
// For each of its packs of a tile a thread has kRingSlots slots at each peer. It goes through its tiles in order,
// pushing ahead of its polling, and empties each slot as soon as it has polled it; a ring leaves its buffer empty. Why
// reuse is safe. Tile k + kRingSlots goes where tile k was, once each peer has given credit for tile k: all threads of
// its block of this number have emptied that tile's slots and those before and passed a barrier, and one of them has
// stored the credit at this rank as a release of what went before; a thread that awaits credit acquires it. A block
// gives credit for kCreditTiles tiles at once. A credit is a word of this rank's workspace, one for each peer and
// block, which the peer alone writes: the epoch, and the last bits of the number of tiles over kCreditTiles. What an
// earlier launch has left there has another epoch. Within an epoch the word is never far from what is awaited, since no
// rank gets ahead of its peers by more than its slots. No rank waits in vain: what a block must have received to give
// credit for tile k, its peers push with tile k + 1 at the latest, for which they need credit for tile k - 2 at most
// (tests/ops/test_protocol.py).
#pragma once

#include "cuda/device/partition.cuh"
#include "cuda/device/push.cuh"

namespace sgl_comm::device {

// How many blocks a multiprocessor is to hold at least; half of them are a launch's (residency.h). For more than four
// ranks it has not been measured.
constexpr int ring_blocks(int world) { return world <= 4 ? 2 : 1; }

// One thread's way through a ring. A tile has kTile packs of each thread; packs of neighbouring threads are neighbours.
template <int kTile>
struct Ring {
  GridPosition position;

  // The bytes of a buffer that one thread of one sender needs.
  static constexpr int kBytes = kRingSlots * kTile * kPackBytes;

  // How many tiles `num_packs` are, for every thread alike; some may have no pack in the last one.
  __device__ __forceinline__ int64_t num_tiles(int64_t num_packs) const {
    const int64_t packs = kTile * position.count;
    return (num_packs + packs - 1) / packs;
  }
  // Which pack of the message is this thread's pack u of tile k.
  __device__ __forceinline__ int64_t pack_of(int64_t k, int u) const {
    return (k * kTile + u) * position.count + position.index;
  }
  // Where that pack goes in a sender's part of the buffer, and how many bytes such a part has.
  __device__ __forceinline__ uint32_t offset(int64_t k, int u) const {
    const uint32_t turn = static_cast<uint32_t>(k) % kRingSlots;
    return ((turn * kTile + u) * static_cast<uint32_t>(position.count) + static_cast<uint32_t>(position.index)) *
           kPackBytes;
  }
  __device__ __forceinline__ uint32_t stride() const { return kBytes * static_cast<uint32_t>(position.count); }
};

// The credits that this block awaits from its peers and gives to them.
template <int kWorld>
class Credits {
 public:
  __device__ __forceinline__ Credits(const PushParameters& params, const Start& start, int64_t num_tiles)
      : view_(params.view), op_(params.op), epoch_(start.epoch() * kEpoch), num_tiles_(num_tiles) {}

  // Before tile k is pushed, if there is such a tile: waits until its slots are empty at every peer.
  __device__ __forceinline__ Status await_credit(int64_t k) const {
    if (k < kRingSlots || k % kCreditTiles != 0 || k >= num_tiles_) return kOk;
    const unsigned long long wanted = credit_for(k - kRingSlots + kCreditTiles - 1);
    const int world = world_of<kWorld>(view_.group);
#pragma unroll 1
    for (int p = 0; p < world - 1; ++p) {
      const unsigned long long* const word = credit_of(view_, view_.group.rank, p);
      const auto missing = [&] {
        const unsigned long long found = ptx::load_acquire_sys(word);
        return (found ^ wanted) / kEpoch != 0 || static_cast<int16_t>(found - wanted) < 0;
      };
      if (!await(view_.group, missing, kWorld > 2)) return sender_at(p, view_.group.rank);
    }
    return kOk;
  }

  // After tile k's slots have been emptied. Needs all threads of the block, each with its own status. At a tile that
  // gives credit, returns true if any of them has failed: then `status` says so in all of them.
  __device__ __forceinline__ bool give_credit(int64_t k, Status& status) const {
    __shared__ Status status_of_block;
    if (k % kCreditTiles != kCreditTiles - 1 || k + 1 - kCreditTiles + kRingSlots >= num_tiles_) return false;
    if (status != kOk) {
      fail_group(view_.group, world_of<kWorld>(view_.group), status, op_,
                 epoch_ / kEpoch);  // before others of the block wait as long
      status_of_block = status;
    }
    if (__syncthreads_or(status != kOk)) {
      status = status_of_block;
      return true;
    }
    if (threadIdx.x < world_of<kWorld>(view_.group) - 1) {
      const int rank = view_.group.rank, peer = sender_at(threadIdx.x, rank);
      ptx::store_release_sys(credit_of(view_, peer, sender_index(rank, peer)), credit_for(k));
    }
    return false;
  }

 private:
  __device__ __forceinline__ unsigned long long credit_for(int64_t k) const {
    return epoch_ | ((k + 1) / kCreditTiles & (kEpoch - 1));
  }

  const PushView& view_;
  const Op op_;
  const unsigned long long epoch_;
  const int64_t num_tiles_;
};

}  // namespace sgl_comm::device
