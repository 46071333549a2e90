// The ring: a message of any size through a bank of bounded size, within one epoch.
//
// A thread has kRingPlaces places at each peer, for each of its packs of a tile, and goes through its tiles in order,
// one tile pushed ahead of the one it polls. It empties each place as it has polled it; a ring leaves its bank empty.
// Why reuse is safe. Tile k + 4 goes where tile k was. The sender pushes it when it has received tile k + 2 of the
// peer, or what the peer made of it, which the peer pushed after it had emptied tile k's place: the fence that ends
// each tile is the release between the two, the sender's own fence the acquire. With one tile ahead, three places would
// not do (tests/test_protocol.py).
#pragma once

#include "cuda/device/message.cuh"

namespace sgl_comm::device {

constexpr int kRingPlaces = 4;

// Of one thread. A tile has kTile packs of each thread; packs of neighbouring threads are neighbours.
template <int kTile>
struct Ring {
  Place place;

  // The bytes of the bank that a thread needs, of one sender.
  static constexpr int kBytes = kRingPlaces * kTile * kPackBytes;

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

}  // namespace sgl_comm::device
