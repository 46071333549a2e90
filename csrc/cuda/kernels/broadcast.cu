// Holds the broadcast kernel: one rank, the source, pushes its message to every peer, bit for bit, in rows with marks
// (marks.cuh), and goes on without waiting for them to have it.
//
// It does not use the buffers, whose reuse is safe because every launch waits for every peer (push.cuh), and leaves the
// BufferState as it is. It has slots of its own behind them: kBroadcastSlots for each block, each for a row a warp. A
// message passes through them in tiles, and a block counts the tiles that it has handled since init, whoever was the
// source. Grids and numbers of tiles are functions of the message, so a block's count is the same on every rank.
//
// Who writes what, when. The rows of a block's tile n lie in slot n % kBroadcastSlots of that block at each receiver,
// written by the launch's source, polled and emptied by the receiver's block of this number. For each block every rank
// keeps a count for each rank: how many tiles that rank's block is done with. A rank writes its own count at the end of
// a launch; a peer's count is written by the peer alone: at the start of a launch, when it is done with all before it,
// and during a launch, as a release, where the source may wait for it. Why reuse is safe. A source pushes tile n when
// it has seen (acquire) that each peer is done with tile n - kBroadcastSlots; so that peer has emptied what a source
// had put there, or was that source itself. No rank waits in vain: what a receiver must have got to be done with tile n
// - kBroadcastSlots, its source has pushed before; and it publishes its count after every kDoneTiles-th tile, or at the
// start of its next launch if no tile of this one waits for it (tests/ops/test_broadcast_protocol.py).
#include "cuda/device/dispatch.cuh"
#include "cuda/device/layout.cuh"
#include "cuda/device/marks.cuh"
#include "cuda/device/push.cuh"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::device {

// The counts of tiles that this block reads and publishes.
class TileCounts {
 public:
  __device__ __forceinline__ explicit TileCounts(const BroadcastParameters& params)
      : params_(params),
        own_(count_of(params.view, params.view.group.rank, params.view.group.rank)),
        first_(ptx::load_relaxed_sys_u64(own_)) {}

  // Where this warp's row of the launch's tile k goes in a rank's workspace.
  __device__ __forceinline__ uint8_t* row_at(int rank, int64_t k) const {
    const uint32_t slot = static_cast<uint32_t>(first_ + k) % kBroadcastSlots;
    return broadcast_slots_of(params_.view, rank) + blockIdx.x * kBroadcastBlockBytes +
           (slot * kBroadcastRows + threadIdx.x / 32) * kBroadcastRowBytes;
  }

  // At the start of the launch: publishes that this block is done with all tiles before it. The end of the kernel
  // before stands for the release. (A source need not publish; it does so that later sources need not wait for it.)
  __device__ __forceinline__ void publish_start() const {
    const int peer = threadIdx.x;
    if (is_peer(peer)) ptx::store_relaxed_sys_u64(count_at(peer), first_);
  }

  // During the launch: publishes that this block is done with tiles up to k. Before: all threads have passed a barrier
  // since they emptied them.
  __device__ __forceinline__ void publish_done(int64_t k) const {
    const int peer = threadIdx.x;
    if (is_peer(peer)) ptx::store_release_sys(count_at(peer), first_ + k + 1);
  }
  // Whether the source of so many tiles may wait for that.
  static __device__ __forceinline__ bool awaited(int64_t k, int64_t num_tiles) {
    return k % kDoneTiles == kDoneTiles - 1 && k + 1 - kDoneTiles + kBroadcastSlots < num_tiles;
  }

  // At the end: keeps the count for the next launch. Before: all threads have passed a barrier since they made this.
  __device__ __forceinline__ void keep(int64_t num_tiles) const {
    if (threadIdx.x == 0) *own_ = first_ + num_tiles;
  }

  // Reads the peers' counts. Returns the peer whose count is the lowest.
  __device__ __forceinline__ int look() {
    fewest_ = INT64_MAX;
    int last = 0;
#pragma unroll 1
    for (int r = 0; r < params_.world; ++r) {
      if (!is_peer(r)) continue;
      const auto done = static_cast<int64_t>(ptx::load_acquire_sys(count_of(params_.view, params_.view.group.rank, r)));
      if (done < fewest_) {
        fewest_ = done;
        last = r;
      }
    }
    return last;
  }
  // Before tile k is pushed: waits until its slots are empty at every peer, unless look() has seen that already.
  __device__ __forceinline__ Status await_slots(int64_t k) {
    const int64_t wanted = static_cast<int64_t>(first_) + k + 1 - kBroadcastSlots;
    if (fewest_ >= wanted) return kOk;
    int last = 0;
    const auto behind = [&] {
      last = look();
      return fewest_ < wanted;
    };
    return await(params_.view.group, behind) ? kOk : last;
  }

 private:
  __device__ __forceinline__ bool is_peer(int rank) const {
    return rank < params_.world && rank != params_.view.group.rank;
  }
  __device__ __forceinline__ unsigned long long* count_at(int peer) const {
    return count_of(params_.view, peer, params_.view.group.rank);
  }

  const BroadcastParameters& params_;
  unsigned long long* const own_;
  const unsigned long long first_;  // tiles before this launch's
  int64_t fewest_ = 0;              // that a peer is done with, when this thread last looked
};

template <typename Layout>
using BroadcastOf = typename Layout::template ParametersOf<BroadcastParameters>;

// This thread's pack of a row; zeros beyond the last row.
template <typename Layout>
__device__ __forceinline__ uint4 load_of_row(const BroadcastOf<Layout>& params, const Warp& warp, int64_t row) {
  if (row >= params.num_rows) return uint4{};
  return Layout::load(params, row * kRowData + warp.lane);
}
template <typename Layout>
__device__ __forceinline__ void store_to_row(const BroadcastOf<Layout>& params, const Warp& warp, int64_t row,
                                             uint4 v) {
  Layout::store(params, row * kRowData + warp.lane, v);
}

// The source's part: pushes all of the message as its peers empty their slots. `pack` is of the first row; the packs of
// further rows are loaded a tile ahead.
template <typename Layout>
__device__ __forceinline__ Status push_tiles(const BroadcastOf<Layout>& params, const Warp& warp, TileCounts& counts,
                                             uint4 pack) {
  int64_t row = warp.position.index;
  for (int64_t k = 0; row < params.num_rows; ++k) {
    const uint4 next = load_of_row<Layout>(params, warp, row + warp.position.count);
    const Status status = counts.await_slots(k);
    const uint32_t late = __ballot_sync(kFullWarp, status != kOk);
    if (late != 0) return __shfl_sync(kFullWarp, status, __ffs(late) - 1);  // the marks need all threads of the warp
    const uint4 marks = marks_of(pack), sent = without_sentinel(pack);
#pragma unroll 1
    for (int r = 0; r < params.world; ++r) {
      if (r == params.source) continue;
      uint8_t* const at = counts.row_at(r, k);
      ptx::store_relaxed_sys(at + warp.lane * kPackBytes, sent);
      if (warp.lane % 16 == 0) ptx::store_relaxed_sys(at + warp.marks, marks);
    }
    if (params.out != nullptr) store_to_row<Layout>(params, warp, row, pack);
    row += warp.position.count;
    pack = next;
  }
  return kOk;
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

// Waits for what fetch_row() found incomplete, restores the sentinels that the marks name, and empties the slots. Needs
// all threads of the warp.
__device__ __forceinline__ Status take_row(const BroadcastParameters& params, const Warp& warp, uint8_t* row,
                                           Fetched& fetched) {
  uint8_t *const slot = row + warp.lane * kPackBytes, *const marked = row + warp.marks;
  const auto incomplete = [&] {
    const bool no_pack = any_sentinel(fetched.pack), no_marks = any_sentinel(fetched.marks);
    if (no_pack) fetched.pack = ptx::load_relaxed_sys(slot);
    if (no_marks) fetched.marks = ptx::load_relaxed_sys(marked);
    return no_pack || no_marks;
  };
  const bool here = await(params.view.group, incomplete, params.world > 2);
  if (!__all_sync(kFullWarp, here)) return params.source;  // all have read the marks before one empties their slot
  *reinterpret_cast<uint4*>(slot) = sentinel_pack();
  if (warp.lane % 16 == 0) *reinterpret_cast<uint4*>(marked) = sentinel_pack();
  fetched.pack = with_marked_sentinels(fetched.pack, fetched.marks);
  return kOk;
}

// A receiver's part: takes all of the message, loading rows a tile ahead. Needs all threads of the block; if one has
// failed at a tile that the source awaits, all return its status.
template <typename Layout>
__device__ __forceinline__ Status take_tiles(const BroadcastOf<Layout>& params, const Warp& warp, const Start& start,
                                             const TileCounts& counts, int64_t num_tiles) {
  __shared__ Status status_of_block;
  const int rank = params.view.group.rank;
  Status status = kOk;
  Fetched fetched = fetch_row(warp, counts.row_at(rank, 0));
  for (int64_t k = 0; k < num_tiles; ++k) {
    const int64_t row = k * warp.position.count + warp.position.index;
    Fetched next{};
    if (k + 1 < num_tiles) next = fetch_row(warp, counts.row_at(rank, k + 1));
    if (row < params.num_rows && status == kOk) {
      status = take_row(params, warp, counts.row_at(rank, k), fetched);
      if (status == kOk) store_to_row<Layout>(params, warp, row, fetched.pack);
    }
    fetched = next;
    if (!counts.awaited(k, num_tiles)) continue;
    if (status != kOk) {
      fail_group(params.view.group, params.world, status, Op::kBroadcast,
                 start.epoch());  // before others of the block wait as long
      status_of_block = status;
    }
    if (__syncthreads_or(status != kOk)) return status_of_block;
    counts.publish_done(k);
  }
  return status;
}

// For a group that has failed: 0xFF in every byte of the result that this thread would have written, and a fault for
// the host.
template <typename Layout>
__device__ __forceinline__ void fail_broadcast(const BroadcastOf<Layout>& params, const Warp& warp, const Start& start,
                                               Status status) {
#pragma unroll 1
  for (int64_t row = warp.position.index; params.out != nullptr && row < params.num_rows; row += warp.position.count) {
    store_to_row<Layout>(params, warp, row, sentinel_pack());
  }
  fail_group(params.view.group, params.world, status, Op::kBroadcast, start.epoch());
}

// Blocks are small, so that they fit beside those of a peer that is ahead where ranks share a device.
template <typename Layout>
__global__ void __launch_bounds__(kBroadcastThreads, 4)
    broadcast_kernel(const __grid_constant__ BroadcastOf<Layout> params) {
  const Warp warp = warp_in_grid();
  const int64_t num_tiles = (params.num_rows + warp.position.count - 1) / warp.position.count;
  // Threads that pass a barrier with others of their block must have read the same start as they.
  const bool warps_apart = blockDim.x <= 64 && num_tiles == 1, source = params.view.group.rank == params.source;
  ptx::wait_for_previous_kernel();
  if (num_tiles == 1) ptx::launch_next_kernel();
  TileCounts counts(params);
  const Start start = warps_apart ? read_start<false>(params.view.group) : read_start<true>(params.view.group);
  uint4 pack{};
  if (source) {
    pack = load_of_row<Layout>(params, warp, warp.position.index);
    counts.look();
  }
  counts.publish_start();
  const Entry entry =
      enter_with<false>(params.view.group, start, [](const BufferState& state) { return state.unchanged(); });
  Status status = start.status();
  if (__any_sync(kFullWarp, status != kOk)) {
    status = status != kOk ? status : kFailedBefore;
  } else {
    status = source ? push_tiles<Layout>(params, warp, counts, pack)
                    : take_tiles<Layout>(params, warp, start, counts, num_tiles);
  }
  if (num_tiles > 1) ptx::launch_next_kernel();
  counts.keep(num_tiles);
  if (!leave(entry)) status = kOverlap;
  if (status != kOk) fail_broadcast<Layout>(params, warp, start, status);
}

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

BroadcastKernel broadcast_kernel(Unit unit) {
  switch (unit) {
    case Unit::kPacks:
      return device::broadcast_kernel<device::RowMajor<device::BytePairs, true>>;
    case Unit::kBytePairs:
      return device::broadcast_kernel<device::RowMajor<device::BytePairs, false>>;
    case Unit::kBytes:
      return device::broadcast_kernel<device::RowMajor<device::Bytes, false>>;
  }
  fail("sgl_comm: no kernel moves unit number ", static_cast<int>(unit));
}

StridedBroadcastKernel strided_broadcast_kernel(int64_t unit_bytes) {
  switch (unit_bytes) {
    case 4:
      return device::broadcast_kernel<device::Strided<device::ByteQuads>>;
    case 2:
      return device::broadcast_kernel<device::Strided<device::BytePairs>>;
    case 1:
      return device::broadcast_kernel<device::Strided<device::Bytes>>;
  }
  fail("sgl_comm: no kernel moves units of ", unit_bytes, " bytes");
}

}  // namespace sgl_comm::cuda
