// Broadcast: one rank, the source, pushes its message to every peer, bit for bit, in rows of gather.cuh, and goes on
// without waiting for them to have it.
//
// So it has no part in the banks, whose reuse is safe because every launch waits for every peer (push.cuh), and leaves
// their baton as it is. It has places of its own behind them: each block eight, for a row a warp. A message passes
// through them in tiles, and a block counts the tiles that it has been through since init, whoever was the source.
// Grids and numbers of tiles are functions of the message, so a block's count is the same on every rank.
//
// Who writes what, when. The rows of a block's tile n lie in the places n % kBroadcastPlaces of that block at each
// receiver, written by the launch's source, polled and emptied by the receiver's block of this number. Of each block
// every rank keeps a count for each rank: how many tiles that one's block is done with. Its own it writes at a launch's
// end; a peer's is written by the peer alone: at the start of a launch, when it is done with all before it, and in
// between, behind a release, where the source may wait for it.
// Why reuse is safe. A source pushes tile n when it has seen (acquire) that each peer is done with tile
// n - kBroadcastPlaces; so that peer has emptied what a source had put there, or was that source itself.
// No rank waits in vain: what a receiver must have got to be done with tile n - kBroadcastPlaces, its source has pushed
// before; and it says so after every kDoneTiles-th tile, or at the start of its next launch if no tile of this one
// waits for it (tests/test_broadcast_protocol.py).
#pragma once

#include "cuda/device/gather.cuh"
#include "cuda/device/layout.cuh"

namespace sgl_comm::device {

// What this block's threads know of the ranks' counts.
class Counts {
 public:
  __device__ __forceinline__ explicit Counts(const BroadcastMessage& m)
      : m_(m), own_(count_of(m.view, m.view.group.rank, m.view.group.rank)), first_(ptx::load_relaxed_sys_u64(own_)) {}

  // Where this warp's row of the launch's tile k goes, in a rank's workspace.
  __device__ __forceinline__ uint8_t* row_at(int rank, int64_t k) const {
    const uint32_t place = static_cast<uint32_t>(first_ + k) % kBroadcastPlaces;
    return broadcast_places_of(m_.view, rank) + blockIdx.x * kBroadcastBlockBytes +
           (place * kBroadcastRows + threadIdx.x / 32) * kBroadcastRowBytes;
  }

  // At the start of the launch: this block is done with all before it. That the kernel before has ended stands for the
  // release. (A source need not tell; it does, so that later ones need not wait for it.)
  __device__ __forceinline__ void tell_start() const {
    const int peer = threadIdx.x;
    if (is_peer(peer)) ptx::store_relaxed_sys_u64(told_to(peer), first_);
  }

  // In between: it is done with tiles up to k, all threads having met since they emptied them.
  __device__ __forceinline__ void tell_done(int64_t k) const {
    const int peer = threadIdx.x;
    if (is_peer(peer)) ptx::store_release_sys(told_to(peer), first_ + k + 1);
  }
  // Whether a source with so many tiles may wait to be told that.
  static __device__ __forceinline__ bool awaited(int64_t k, int64_t num_tiles) {
    return k % kDoneTiles == kDoneTiles - 1 && k + 1 - kDoneTiles + kBroadcastPlaces < num_tiles;
  }

  // At the end, for the next launch. All threads have met since they made this.
  __device__ __forceinline__ void keep(int64_t num_tiles) const {
    if (threadIdx.x == 0) *own_ = first_ + num_tiles;
  }

  // Asks how far the peers are. Returns which of them is least far.
  __device__ __forceinline__ int look() {
    fewest_ = INT64_MAX;
    int last = 0;
#pragma unroll 1
    for (int r = 0; r < m_.world; ++r) {
      if (!is_peer(r)) continue;
      const auto done = static_cast<int64_t>(ptx::load_acquire_sys(count_of(m_.view, m_.view.group.rank, r)));
      if (done < fewest_) {
        fewest_ = done;
        last = r;
      }
    }
    return last;
  }
  // Before tile k is pushed: waits until its places are empty at every peer, as far as look() has not seen it.
  __device__ __forceinline__ Trouble await_places(int64_t k) {
    const int64_t wanted = static_cast<int64_t>(first_) + k + 1 - kBroadcastPlaces;
    if (fewest_ >= wanted) return kFine;
    int last = 0;
    const auto behind = [&] {
      last = look();
      return fewest_ < wanted;
    };
    return await(m_.view.group, behind) ? kFine : last;
  }

 private:
  __device__ __forceinline__ bool is_peer(int rank) const { return rank < m_.world && rank != m_.view.group.rank; }
  __device__ __forceinline__ unsigned long long* told_to(int peer) const {
    return count_of(m_.view, peer, m_.view.group.rank);
  }

  const BroadcastMessage& m_;
  unsigned long long* const own_;
  const unsigned long long first_;  // tiles before this launch's
  int64_t fewest_ = 0;              // that a peer is done with, when this thread last looked
};

template <typename Layout>
using BroadcastOf = typename Layout::template MessageOf<BroadcastMessage>;

// This thread's pack of a row: zeros where there is none.
template <typename Layout>
__device__ __forceinline__ uint4 load_of_row(const BroadcastOf<Layout>& m, const Warp& warp, int64_t row) {
  if (row >= m.num_rows) return uint4{};
  return Layout::load(m, row * kRowData + warp.lane);
}
template <typename Layout>
__device__ __forceinline__ void store_to_row(const BroadcastOf<Layout>& m, const Warp& warp, int64_t row, uint4 v) {
  Layout::store(m, row * kRowData + warp.lane, v);
}

// The source's part: pushes all of the message, as its peers make room for it. `pack` is of the first row; further ones
// are asked for a tile ahead.
template <typename Layout>
__device__ __forceinline__ Trouble push_tiles(const BroadcastOf<Layout>& m, const Warp& warp, Counts& counts,
                                              uint4 pack) {
  int64_t row = warp.place.index;
  for (int64_t k = 0; row < m.num_rows; ++k) {
    const uint4 next = load_of_row<Layout>(m, warp, row + warp.place.count);
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
    if (m.out != nullptr) store_to_row<Layout>(m, warp, row, pack);
    row += warp.place.count;
    pack = next;
  }
  return kFine;
}

// This thread's pack of a row and its half of the warp's marks, as far as they are there yet.
struct Fetched {
  uint4 pack, marks;
};
__device__ __forceinline__ Fetched fetch_row(const Warp& warp, const uint8_t* row) {
  Fetched fetched;
  fetched.pack = ptx::load_relaxed_sys(row + warp.lane * kPackBytes);
  fetched.marks = ptx::load_relaxed_sys(row + warp.marks);
  return fetched;
}

// Waits for what fetch_row() has not found, puts back what the marks say, and empties the places. Needs the whole warp.
__device__ __forceinline__ Trouble take_row(const BroadcastMessage& m, const Warp& warp, uint8_t* row,
                                            Fetched& fetched) {
  uint8_t *const place = row + warp.lane * kPackBytes, *const marked = row + warp.marks;
  const auto incomplete = [&] {
    const bool no_pack = any_sentinel(fetched.pack), no_marks = any_sentinel(fetched.marks);
    if (no_pack) fetched.pack = ptx::load_relaxed_sys(place);
    if (no_marks) fetched.marks = ptx::load_relaxed_sys(marked);
    return no_pack || no_marks;
  };
  const bool here = await(m.view.group, incomplete, m.world > 2);
  if (!__all_sync(kWholeWarp, here)) return m.source;  // all have read the marks before one empties their place
  *reinterpret_cast<uint4*>(place) = sentinel_pack();
  if (warp.lane % 16 == 0) *reinterpret_cast<uint4*>(marked) = sentinel_pack();
  fetched.pack = with_marked_sentinels(fetched.pack, fetched.marks);
  return kFine;
}

// A receiver's part: takes all of the message, asking for a row a tile ahead. Needs all threads of the block; where one
// is in trouble at a tile that is awaited, all are.
template <typename Layout>
__device__ __forceinline__ Trouble take_tiles(const BroadcastOf<Layout>& m, const Warp& warp, const Start& start,
                                              const Counts& counts, int64_t num_tiles) {
  __shared__ Trouble of_block;
  const int rank = m.view.group.rank;
  Trouble trouble = kFine;
  Fetched fetched = fetch_row(warp, counts.row_at(rank, 0));
  for (int64_t k = 0; k < num_tiles; ++k) {
    const int64_t row = k * warp.place.count + warp.place.index;
    Fetched next{};
    if (k + 1 < num_tiles) next = fetch_row(warp, counts.row_at(rank, k + 1));
    if (row < m.num_rows && trouble == kFine) {
      trouble = take_row(m, warp, counts.row_at(rank, k), fetched);
      if (trouble == kFine) store_to_row<Layout>(m, warp, row, fetched.pack);
    }
    fetched = next;
    if (!counts.awaited(k, num_tiles)) continue;
    if (trouble != kFine) {
      fail_group(m.view.group, m.world, trouble, kBroadcast, start.epoch());  // before others of the block wait as long
      of_block = trouble;
    }
    if (__syncthreads_or(trouble != kFine)) return of_block;
    counts.tell_done(k);
  }
  return trouble;
}

// 0xFF in every byte of the result that this thread would have written, and a word for the host.
template <typename Layout>
__device__ __forceinline__ void give_up_broadcast(const BroadcastOf<Layout>& m, const Warp& warp, const Start& start,
                                                  Trouble trouble) {
#pragma unroll 1
  for (int64_t row = warp.place.index; m.out != nullptr && row < m.num_rows; row += warp.place.count) {
    store_to_row<Layout>(m, warp, row, sentinel_pack());
  }
  fail_group(m.view.group, m.world, trouble, kBroadcast, start.epoch());
}

// Small blocks, which find room beside those of a peer that is ahead where ranks share a device.
template <typename Layout>
__global__ void __launch_bounds__(kBroadcastThreads, 4)
    broadcast_kernel(const __grid_constant__ BroadcastOf<Layout> m) {
  const Warp warp = warp_in_grid();
  const int64_t num_tiles = (m.num_rows + warp.place.count - 1) / warp.place.count;
  // Whoever may meet others of its block in between must see the same start as they.
  const bool warps_apart = blockDim.x <= 64 && num_tiles == 1, source = m.view.group.rank == m.source;
  ptx::wait_for_previous_kernel();
  if (num_tiles == 1) ptx::launch_next_kernel();
  Counts counts(m);
  const Start start = warps_apart ? read_start<false>(m.view.group) : read_start<true>(m.view.group);
  uint4 pack{};
  if (source) {
    pack = load_of_row<Layout>(m, warp, warp.place.index);
    counts.look();
  }
  counts.tell_start();
  const Entry entry = enter_with<false>(m.view.group, start, [](const Baton& baton) { return baton.passed_on(); });
  Trouble trouble = start.trouble();
  if (__any_sync(kWholeWarp, trouble != kFine)) {
    trouble = trouble != kFine ? trouble : kFailedBefore;
  } else {
    trouble =
        source ? push_tiles<Layout>(m, warp, counts, pack) : take_tiles<Layout>(m, warp, start, counts, num_tiles);
  }
  if (num_tiles > 1) ptx::launch_next_kernel();
  counts.keep(num_tiles);
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) give_up_broadcast<Layout>(m, warp, start, trouble);
}

}  // namespace sgl_comm::device
