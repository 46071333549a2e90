// The ring: a message of any size through a bank of bounded size, within one epoch.
//
// A thread has kRingPlaces places at each peer, for each of its packs of a tile, and goes through its tiles in order,
// pushing ahead of its polling. It empties each place as it has polled it; a ring leaves its bank empty.
// Why reuse is safe. Tile k + kRingPlaces goes where tile k was, once each peer has given credit for tile k: all
// threads of its block of this number have emptied that tile's places and those before, and met at a barrier, and one
// of them has told this rank so by a store that releases what went before; a thread that awaits credit acquires it. A
// block gives credit for kCreditTiles tiles at once.
// A credit is a word of this rank's workspace, one a peer and block, which the peer alone writes: the epoch, and of how
// many times kCreditTiles the last bits. What an earlier launch has left there is of another epoch. Within one, what is
// there is never far from what is awaited, since nobody gets ahead of its peers by more than its places.
// No rank waits in vain: what a block must have received to give credit for tile k, its peers push with tile k + 1 at
// the latest, for which they need credit for tile k - 2 at most (tests/test_protocol.py).
#pragma once

#include "cuda/device/message.cuh"

namespace sgl_comm::device {

// How many blocks a multiprocessor is to hold at least; half of them are a launch's (residency.h). For more than four
// ranks it has not been measured.
constexpr int ring_blocks(int world) { return world <= 4 ? 2 : 1; }

// Of one thread. A tile has kTile packs of each thread; packs of neighbouring threads are neighbours.
template <int kTile>
struct Ring {
  Place place;

  // The bytes of the bank that a thread needs, of one sender.
  static constexpr int kBytes = kRingPlaces * kTile * kPackBytes;

  // How many tiles `num_packs` are, for every thread alike; some may have no pack in the last one.
  __device__ __forceinline__ int64_t num_tiles(int64_t num_packs) const {
    const int64_t packs = kTile * place.count;
    return (num_packs + packs - 1) / packs;
  }
  // Which pack of the message is this thread's pack u of tile k.
  __device__ __forceinline__ int64_t pack_of(int64_t k, int u) const {
    return (k * kTile + u) * place.count + place.index;
  }
  // Where it goes in what a rank keeps for one sender, and how far senders are apart.
  __device__ __forceinline__ uint32_t offset(int64_t k, int u) const {
    const uint32_t turn = static_cast<uint32_t>(k) % kRingPlaces;
    return ((turn * kTile + u) * static_cast<uint32_t>(place.count) + static_cast<uint32_t>(place.index)) * kPackBytes;
  }
  __device__ __forceinline__ uint32_t stride() const { return kBytes * static_cast<uint32_t>(place.count); }
};

// What this block's threads know of the places at their peers, and tell of their own.
template <int kWorld>
class Credits {
 public:
  __device__ __forceinline__ Credits(const Message& m, const Start& start, int64_t num_tiles)
      : view_(m.view), op_(m.op), epoch_(start.epoch() * kEpoch), num_tiles_(num_tiles) {}

  // Before tile k is pushed, if there is one: waits until its places are empty at every peer.
  __device__ __forceinline__ Trouble await_credit(int64_t k) const {
    if (k < kRingPlaces || k % kCreditTiles != 0 || k >= num_tiles_) return kFine;
    const unsigned long long wanted = credit_for(k - kRingPlaces + kCreditTiles - 1);
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
    return kFine;
  }

  // After tile k's places have been emptied. Needs all threads of the block, each with its own trouble. True, at a
  // tile that gives credit, if any of them is in trouble: then all are.
  __device__ __forceinline__ bool give_credit(int64_t k, Trouble& trouble) const {
    __shared__ Trouble of_block;
    if (k % kCreditTiles != kCreditTiles - 1 || k + 1 - kCreditTiles + kRingPlaces >= num_tiles_) return false;
    if (trouble != kFine) {
      fail_group(view_.group, world_of<kWorld>(view_.group), trouble, op_,
                 epoch_ / kEpoch);  // before others of the block wait as long
      of_block = trouble;
    }
    if (__syncthreads_or(trouble != kFine)) {
      trouble = of_block;
      return true;
    }
    if (threadIdx.x < world_of<kWorld>(view_.group) - 1) {
      const int rank = view_.group.rank, peer = sender_at(threadIdx.x, rank);
      ptx::store_release_sys(credit_of(view_, peer, place_of_sender(rank, peer)), credit_for(k));
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
