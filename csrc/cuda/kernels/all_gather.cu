// Holds the all-gather kernels: every rank pushes its message to every peer, bit for bit, whatever the bits.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/marks.cuh"
#include "cuda/device/partition.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::device {

template <int kWorld>
__device__ __forceinline__ void push_row(const Peers<kWorld>& peers, const Warp& warp, uint64_t row, uint4 pack) {
  const uint4 marks = marks_of(pack);
  peers.push(row + warp.lane * kPackBytes, without_sentinel(pack));
  if (warp.lane % 16 == 0) peers.push(row + warp.marks, marks);
}

// Waits for every peer's pack and marks and writes the packs where they belong.
template <typename T, int kWorld, bool kAligned>
__device__ __forceinline__ Status receive_row(const PushParameters& params, const Warp& warp, const uint8_t* row,
                                              uint32_t stride, int64_t index) {
  uint4 packs[kPeers<kWorld>], marks[kPeers<kWorld>];
  Status status = await_peers<kWorld>(params.view.group, row + warp.lane * kPackBytes, stride, packs);
  if (status != kOk) return status;
  status = await_peers<kWorld>(params.view.group, row + warp.marks, stride, marks);
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if (status != kOk) continue;
    const Part<T> shard = shard_of<T>(params, params.out, sender_at(p, params.view.group.rank));
    store_to<T, kAligned>(shard, index, with_marked_sentinels(packs[p], marks[p]));
  }
  return status;
}

// For a group that has failed, now or before: 0xFF in every byte that this warp would have written, and a fault for the
// host. Needs all threads of the warp, whatever the status of each.
template <typename T, int kWorld, bool kAligned>
__device__ __forceinline__ void fail_rows(const PushParameters& params, const Warp& warp, int64_t num_rows,
                                          const Start& start, Status status) {
  if (!__any_sync(kFullWarp, status != kOk)) return;
#pragma unroll 1
  for (int64_t row = warp.position.index; row < num_rows; row += warp.position.count) {
#pragma unroll 1
    for (int r = 0; r < world_of<kWorld>(params.view.group); ++r) {
      store_to<T, kAligned>(shard_of<T>(params, params.out, r), row * kRowData + warp.lane, sentinel_pack());
    }
  }
  if (status != kOk)
    fail_group(params.view.group, world_of<kWorld>(params.view.group), status, params.op, start.epoch());
}

// `in` has shard_count elements, `out` has count, one shard a rank. All of the message fits into the buffer: num_rows
// rows of each sender.
template <typename T, int kWorld, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 1) gather_kernel(const __grid_constant__ PushParameters params) {
  const GroupView& group = params.view.group;
  const Warp warp = warp_in_grid();
  const int64_t num_rows = (params.num_packs + kRowData - 1) / kRowData;
  const uint32_t stride = static_cast<uint32_t>(num_rows) * kRowPacks * kPackBytes;
  const auto load = [&](int64_t row) {
    return load_pack<T, kAligned>(params.in, params.shard_count, row * kRowData + warp.lane);
  };
  const Peers<kWorld> peers(params.view, stride);
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();
  const Start start = read_start<false>(group);
  const uint64_t buffer = buffer_offset(params.view, start.buffer());
  Status status = start.status();
  for (int64_t row = warp.position.index; row < num_rows; row += warp.position.count) {
    const uint4 own = load(row);
    if (__any_sync(kFullWarp, status != kOk)) break;  // the marks need all threads of the warp
    push_row<kWorld>(peers, warp, buffer + row * kRowPacks * kPackBytes, own);
    store_to<T, kAligned>(shard_of<T>(params, params.out, group.rank), row * kRowData + warp.lane, own);
  }
  const Entry entry =
      enter<false>(group, start, static_cast<uint32_t>((world_of<kWorld>(group) - 1) * num_rows * kRowPacks));
  if (status == kOk) {
    const GridPosition position = grid_position();
    empty_previous(params.view, start, position.index, position.count);
    const uint8_t* rows = buffers_of(params.view, group.rank) + buffer;
    for (int64_t row = warp.position.index; row < num_rows && status == kOk; row += warp.position.count) {
      status = receive_row<T, kWorld, kAligned>(params, warp, rows + row * kRowPacks * kPackBytes, stride,
                                                row * kRowData + warp.lane);
    }
  }
  if (!leave(entry)) status = kOverlap;
  fail_rows<T, kWorld, kAligned>(params, warp, num_rows, start, status);
}

// All-gather for messages that do not fit into the buffer: they go through a ring in tiles of one row a warp.
template <typename T, int kWorld, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, ring_blocks(kWorld))
    gather_ring_kernel(const __grid_constant__ PushParameters params) {
  const GroupView& group = params.view.group;
  const Warp warp = warp_in_grid();
  const Ring<1> ring{warp.position};  // of rows
  const int64_t num_rows = (params.num_packs + kRowData - 1) / kRowData, num_tiles = ring.num_tiles(num_rows);
  const uint32_t stride = ring.stride() * kRowPacks;
  const Peers<kWorld> peers(params.view, stride);
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const uint64_t buffer = buffer_offset(params.view, start.buffer());
  const Credits<kWorld> credits(params, start, num_tiles);
  Status status = start.status();
  const GridPosition position = grid_position();
  if (status == kOk) empty_previous(params.view, start, position.index, position.count);
  for (int64_t k = 0; k <= num_tiles; ++k) {
    if (status == kOk) status = credits.await_credit(k);
    const bool ok = !__any_sync(kFullWarp, status != kOk);  // the marks need all threads of the warp
    const int64_t row = ring.pack_of(k, 0), before = ring.pack_of(k - 1, 0);
    if (row < num_rows && ok) {
      const int64_t index = row * kRowData + warp.lane;
      const uint4 own = load_pack<T, kAligned>(params.in, params.shard_count, index);
      push_row<kWorld>(peers, warp, buffer + ring.offset(k, 0) * kRowPacks, own);
      store_to<T, kAligned>(shard_of<T>(params, params.out, group.rank), index, own);
    }
    if (k == 0) continue;
    if (before < num_rows && ok) {
      uint8_t* const slots = buffers_of(params.view, group.rank) + (buffer + ring.offset(k - 1, 0) * kRowPacks);
      status = receive_row<T, kWorld, kAligned>(params, warp, slots, stride, before * kRowData + warp.lane);
      __syncwarp();  // the marks have been read by all before one of them empties their slot
      empty_slots<kWorld>(group, slots + warp.lane * kPackBytes, stride);
      if (warp.lane % 16 == 0) empty_slots<kWorld>(group, slots + warp.marks, stride);
    }
    if (credits.give_credit(k - 1, status)) break;
  }
  ptx::launch_next_kernel();
  if (!leave(entry)) status = kOverlap;
  fail_rows<T, kWorld, kAligned>(params, warp, num_rows, start, status);
}

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

namespace {

template <typename T, bool kAligned>
PushKernel kernel_for(int world, bool ring) {
  constexpr int kFewestSharing = kAligned ? device::kFewestShared + 1 : device::kFewestShared;
  return visit_kernel_world<kFewestSharing>(world, [&](auto n) -> PushKernel {
    constexpr int kWorld = n.value;
    return ring ? device::gather_ring_kernel<T, kWorld, kAligned> : device::gather_kernel<T, kWorld, kAligned>;
  });
}

}  // namespace

PushKernel gather_kernel(Unit unit, int world, bool ring) {
  switch (unit) {
    case Unit::kPacks:
      return kernel_for<device::BytePairs, true>(world, ring);
    case Unit::kBytePairs:
      return kernel_for<device::BytePairs, false>(world, ring);
    case Unit::kBytes:
      return kernel_for<device::Bytes, false>(world, ring);
  }
  fail("sgl_comm: no kernel moves unit number ", static_cast<int>(unit));
}

}  // namespace sgl_comm::cuda
