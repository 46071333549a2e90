// Sizes that the host and the kernels must agree on: packs, threads and blocks of a launch, and what a workspace holds.
// Plain: the host's compiler reads this too.
#pragma once

#include <cstdint>

#include "cuda/device/view.h"

namespace sgl_comm::device {

constexpr int kPackBytes = 16;

// A kernel's kWorld is how many ranks it serves, or kSharedWorld: then it serves 5 to 7 and finds out at run time how
// many there are (world_of() in push.cuh). The `.cu` files say which are shared, docs/thresholds.md what that costs.
constexpr int kFewestShared = 5, kMostShared = 7, kSharedWorld = 57;
template <int kWorld>
constexpr int kRanks = kWorld == kSharedWorld ? kMostShared : kWorld;  // the most that such a kernel serves
template <int kWorld>
constexpr int kPeers = kRanks<kWorld> - 1;

constexpr int kMaxThreads = 512;      // the most threads of a block, in every push kernel but two_shot_kernel
constexpr int kTwoShotThreads = 128;  // the most threads of a block of two_shot_kernel

// Between the Control and the buffers lie the credits, by which peers tell the blocks of a ring of emptied slots
// (ring.cuh). Each has a sector of its own: with four in one, large messages took a third longer.
constexpr int kMostRingBlocks = 256, kCreditBytes = 32;
constexpr int64_t kCreditsBytes = (kMaxWorld - 1) * kMostRingBlocks * kCreditBytes;
// Behind the credits lie the counts of tiles by which ranks tell each other how far a broadcast is, one for each block
// and rank (broadcast.cu).
constexpr int kMostBroadcastBlocks = 128;
constexpr int64_t kCountsBytes = int64_t{kMaxWorld} * kMostBroadcastBlocks * kCreditBytes;

constexpr int kRingSlots = 4, kCreditTiles = 2;  // ring.cuh

constexpr int kRowData = 32, kRowPacks = kRowData + 2;  // packs of a warp's row, without and with its marks: marks.cuh

// broadcast.cu
constexpr int kBroadcastSlots = 8, kDoneTiles = 4;
static_assert(kDoneTiles <= kBroadcastSlots);
constexpr int kBroadcastThreads = 256;                      // of a block, at most
constexpr int64_t kBroadcastRows = kBroadcastThreads / 32;  // of a block's slot
constexpr int64_t kBroadcastRowBytes = kRowPacks * kPackBytes;
constexpr int64_t kBroadcastBlockBytes = kBroadcastSlots * kBroadcastRows * kBroadcastRowBytes;
constexpr int64_t kBroadcastBytes = kMostBroadcastBlocks * kBroadcastBlockBytes;

// The flags at the start of a pull workspace: pull.cu.
constexpr int kMaxPullBlocks = 256;
constexpr int64_t kFlagBytes = int64_t{kMaxPullBlocks} * kMaxWorld * sizeof(unsigned long long);

// How many blocks of a fused norm a multiprocessor must hold at least, where a thread has `packs` packs of a row.
constexpr int row_blocks(int packs, int world, bool once) {
  return (packs == 1 && (!once || world <= 3)) || (packs == 2 && once && world == 2) ? 2 : 1;
}

}  // namespace sgl_comm::device
