// Broadcast: one rank, the source, pushes its message to every peer, bit for bit, in rows of gather.cuh, and goes on
// without waiting for them to have it.
//
// So it has no part in the banks, whose reuse is safe because every launch waits for every peer (push.cuh), and leaves
// their baton as it is. It has places of its own behind them: each block four, for a row a warp. A message passes
// through them in tiles, and a block counts the tiles that it has been through since init, whoever was the source.
// Grids and numbers of tiles are functions of the message, so a block's count is the same on every rank.
//
// Who writes what, when. The rows of a block's tile n lie in the places n % kBroadcastPlaces of that block at each
// receiver, written by the launch's source, polled and emptied by the receiver's block of this number. Of each block
// every rank keeps a count for each rank: how many tiles that one's block is done with. Its own it writes at a launch's
// end; a peer's is written by the peer alone, which releases what it has emptied before. A source has nothing to empty
// and says at once that it is done with all of its launch.
// Why reuse is safe. A source pushes tile n when it has seen (acquire) that each peer is done with tile
// n - kBroadcastPlaces; so that peer has emptied what an earlier source had put there, or was that source itself.
// No rank waits in vain: what a receiver must have got to be done with tile n - kBroadcastPlaces, its source has pushed
// before; and it says so after every kDoneTiles-th tile and at its launch's end (tests/test_broadcast_protocol.py).
#pragma once

#include "cuda/device/gather.cuh"

namespace sgl_comm::device {

constexpr int kBroadcastPlaces = 4, kDoneTiles = 2;
constexpr int64_t kBroadcastRows = kMaxThreads / 32;  // of a block's place
constexpr int64_t kBroadcastRowBytes = kRowPacks * kPackBytes;
constexpr int64_t kBroadcastBlockBytes = kBroadcastPlaces * kBroadcastRows * kBroadcastRowBytes;
constexpr int64_t kBroadcastBytes = kMostBroadcastBlocks * kBroadcastBlockBytes;

struct BroadcastMessage {
  PushView view;
  const void* in;    // on the source alone
  void* out;         // null on a source whose result is `in`
  int64_t count;     // elements
  int64_t num_rows;  // of kRowData packs
  int source, world;
};

// What this block's threads know of the ranks' counts. Made before the launch's first barrier.
class Counts {
 public:
  __device__ __forceinline__ Counts(const BroadcastMessage& m)
      : m_(m), own_(count_of(m.view, m.view.group.rank, m.view.group.rank)), first_(ptx::load_acquire_sys(own_)) {}

  // Where this warp's row of the launch's tile k goes, in a rank's workspace.
  __device__ __forceinline__ uint8_t* row_at(int rank, int64_t k) const {
    const uint32_t place = static_cast<uint32_t>(first_ + k) % kBroadcastPlaces;
    return broadcast_places_of(m_.view, rank) + blockIdx.x * kBroadcastBlockBytes +
           (place * kBroadcastRows + threadIdx.x / 32) * kBroadcastRowBytes;
  }

  // Before tile k is pushed: waits until its places are empty at every peer.
  __device__ __forceinline__ Trouble await_places(int64_t k) {
    const int64_t wanted = static_cast<int64_t>(first_) + k + 1 - kBroadcastPlaces;
    if (fewest_ >= wanted) return kFine;
    int64_t fewest = INT64_MAX;
#pragma unroll 1
    for (int r = 0; r < m_.world; ++r) {
      if (r == m_.view.group.rank) continue;
      const unsigned long long* const word = count_of(m_.view, m_.view.group.rank, r);
      int64_t done = 0;
      const auto behind = [&] { return (done = static_cast<int64_t>(ptx::load_acquire_sys(word))) < wanted; };
      if (!await(m_.view.group, behind)) return r;
      fewest = done < fewest ? done : fewest;
    }
    fewest_ = fewest;
    return kFine;
  }

  // This block is done with so many tiles of the launch: tells its peers. On a receiver all threads have met after they
  // emptied them.
  __device__ __forceinline__ void tell_done(int64_t num_tiles) const {
    const int rank = m_.view.group.rank, peer = threadIdx.x;
    if (peer < m_.world && peer != rank) ptx::store_release_sys(count_of(m_.view, peer, rank), first_ + num_tiles);
  }
  // At the end, for the next launch. All threads have met since they made this.
  __device__ __forceinline__ void keep(int64_t num_tiles) const {
    if (threadIdx.x == 0) *own_ = first_ + num_tiles;
  }

 private:
  const BroadcastMessage& m_;
  unsigned long long* const own_;
  const unsigned long long first_;  // tiles before this launch's
  int64_t fewest_ = 0;              // that a peer is done with, as far as this thread has seen
};

// The source's part: pushes all of the message, as its peers make room for it.
template <typename T, bool kWhole>
__device__ __forceinline__ Trouble push_tiles(const BroadcastMessage& m, const Warp& warp, Counts& counts,
                                              int64_t num_tiles) {
  counts.tell_done(num_tiles);
  for (int64_t k = 0; k < num_tiles; ++k) {
    const int64_t row = k * warp.place.count + warp.place.index;
    if (row >= m.num_rows) break;
    const int64_t index = row * kRowData + warp.lane;
    const uint4 pack = load_pack<T, kWhole>(m.in, m.count, index);
    const Trouble trouble = counts.await_places(k);
    const uint32_t late = __ballot_sync(kWholeWarp, trouble != kFine);
    if (late != 0) return __shfl_sync(kWholeWarp, trouble, __ffs(late) - 1);  // the marks need the whole warp
    const uint4 marks = marks_of(pack), sent = without_sentinel(pack);
#pragma unroll 1
    for (int r = 0; r < m.world; ++r) {
      if (r == m.source) continue;
      uint8_t* const at = counts.row_at(r, k);
      ptx::store_relaxed_sys(at + warp.lane * kPackBytes, sent);
      if (warp.lane % 16 == 0) ptx::store_relaxed_sys(at + warp.marks, marks);
    }
    if (m.out != nullptr) store_pack<T, kWhole>(m.out, m.count, index, pack);
  }
  return kFine;
}

// Waits for this thread's pack of a row, puts back what the marks say, and empties the places. Needs the whole warp.
__device__ __forceinline__ Trouble take_pack(const BroadcastMessage& m, const Warp& warp, uint8_t* row, uint4& pack) {
  uint8_t *const place = row + warp.lane * kPackBytes, *const marked = row + warp.marks;
  uint4 marks = ptx::load_relaxed_sys(marked);
  pack = ptx::load_relaxed_sys(place);
  const auto incomplete = [&] {
    const bool no_pack = any_sentinel(pack), no_marks = any_sentinel(marks);
    if (no_pack) pack = ptx::load_relaxed_sys(place);
    if (no_marks) marks = ptx::load_relaxed_sys(marked);
    return no_pack || no_marks;
  };
  const bool here = await(m.view.group, incomplete, m.world > 2);
  __syncwarp();  // all have read the marks before one of them empties their place
  if (!here) return m.source;
  *reinterpret_cast<uint4*>(place) = sentinel_pack();
  if (warp.lane % 16 == 0) *reinterpret_cast<uint4*>(marked) = sentinel_pack();
  pack = with_marked_sentinels(pack, marks);
  return kFine;
}

// A receiver's part: takes all of the message. Needs all threads of the block; where one is in trouble, all are.
template <typename T, bool kWhole>
__device__ __forceinline__ Trouble take_tiles(const BroadcastMessage& m, const Warp& warp, const Start& start,
                                              const Counts& counts, int64_t num_tiles) {
  __shared__ Trouble of_block;
  Trouble trouble = kFine;
  for (int64_t k = 0; k < num_tiles; ++k) {
    const int64_t row = k * warp.place.count + warp.place.index;
    if (row < m.num_rows && trouble == kFine) {
      uint4 pack;
      trouble = take_pack(m, warp, counts.row_at(m.view.group.rank, k), pack);
      if (trouble == kFine) store_pack<T, kWhole>(m.out, m.count, row * kRowData + warp.lane, pack);
    }
    if (k % kDoneTiles != kDoneTiles - 1 && k != num_tiles - 1) continue;
    if (trouble != kFine) {
      fail_group(m.view.group, m.world, trouble, kBroadcast, start.epoch());  // before others of the block wait as long
      of_block = trouble;
    }
    if (__syncthreads_or(trouble != kFine)) return of_block;
    counts.tell_done(k + 1);
  }
  return kFine;
}

// 0xFF in every byte of the result that is this warp's, and a word for the host.
template <typename T, bool kWhole>
__device__ __forceinline__ void give_up_broadcast(const BroadcastMessage& m, const Warp& warp, const Start& start,
                                                  Trouble trouble) {
#pragma unroll 1
  for (int64_t row = warp.place.index; m.out != nullptr && row < m.num_rows; row += warp.place.count) {
    store_pack<T, kWhole>(m.out, m.count, row * kRowData + warp.lane, sentinel_pack());
  }
  fail_group(m.view.group, m.world, trouble, kBroadcast, start.epoch());
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 1) broadcast_kernel(const __grid_constant__ BroadcastMessage m) {
  const Warp warp = warp_in_grid();
  const int64_t num_tiles = (m.num_rows + warp.place.count - 1) / warp.place.count;
  ptx::wait_for_previous_kernel();
  if (num_tiles == 1) ptx::launch_next_kernel();
  Counts counts(m);
  const Start start = read_start<true>(m.view.group);
  const Entry entry = enter_with<true>(m.view.group, start, [](const Baton& baton) { return baton.passed_on(); });
  Trouble trouble = start.trouble();
  if (trouble == kFine) {
    trouble = m.view.group.rank == m.source ? push_tiles<T, kWhole>(m, warp, counts, num_tiles)
                                            : take_tiles<T, kWhole>(m, warp, start, counts, num_tiles);
  }
  if (num_tiles > 1) ptx::launch_next_kernel();
  counts.keep(num_tiles);
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) give_up_broadcast<T, kWhole>(m, warp, start, trouble);
}

}  // namespace sgl_comm::device
