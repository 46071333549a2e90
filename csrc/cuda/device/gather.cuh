// All-gather: every rank pushes its message to every peer, bit for bit, whatever the bits.
//
// A word that equals the sentinel is sent as another, and which words those were is told beside the data: a warp's 32
// packs form a row and are followed by two packs of marks, one for each half of the warp, with a word for each word of
// a pack and a bit for each thread. A half has 16 threads, so no mark equals the sentinel.
#pragma once

#include "cuda/device/message.cuh"
#include "cuda/device/ring.cuh"

namespace sgl_comm::device {

constexpr uint32_t kWholeWarp = 0xFFFFFFFFu;

// The marks of this thread's half of the warp. Needs the whole warp.
__device__ __forceinline__ uint4 marks_of(uint4 pack) {
  const int shift = threadIdx.x % 32 / 16 * 16;
  const auto mark = [&](uint32_t word) { return __ballot_sync(kWholeWarp, word == kSentinel) >> shift & 0xFFFFu; };
  return {mark(pack.x), mark(pack.y), mark(pack.z), mark(pack.w)};
}

__device__ __forceinline__ uint4 with_marked_sentinels(uint4 pack, uint4 marks) {
  const int bit = threadIdx.x % 16;
  const auto restored = [&](uint32_t word, uint32_t mark) { return (mark >> bit & 1) != 0 ? kSentinel : word; };
  return {restored(pack.x, marks.x), restored(pack.y, marks.y), restored(pack.z, marks.z), restored(pack.w, marks.w)};
}

// A warp among all of the launch, and this thread in it. Rows are to warps what packs are to threads.
struct Warp {
  Place place;
  int lane;
  uint32_t marks;  // bytes from the row's start to this half's marks
};
__device__ __forceinline__ Warp warp_in_grid() {
  const Place thread = place_in_grid();
  const int lane = threadIdx.x % 32;
  return {{thread.index / 32, thread.count / 32}, lane, static_cast<uint32_t>((kRowData + lane / 16) * kPackBytes)};
}

template <int kWorld>
__device__ __forceinline__ void push_row(const Peers<kWorld>& peers, const Warp& warp, uint64_t row, uint4 pack) {
  const uint4 marks = marks_of(pack);
  peers.push(row + warp.lane * kPackBytes, without_sentinel(pack));
  if (warp.lane % 16 == 0) peers.push(row + warp.marks, marks);
}

// Waits for every peer's pack and marks and writes the packs where they belong.
template <typename T, int kWorld, bool kWhole>
__device__ __forceinline__ Trouble receive_row(const Message& m, const Warp& warp, const uint8_t* row, uint32_t stride,
                                               int64_t index) {
  uint4 packs[kPeers<kWorld>], marks[kPeers<kWorld>];
  Trouble trouble = await_peers<kWorld>(m.view.group, row + warp.lane * kPackBytes, stride, packs);
  if (trouble != kFine) return trouble;
  trouble = await_peers<kWorld>(m.view.group, row + warp.marks, stride, marks);
#pragma unroll
  for (int p = 0; p < kPeers<kWorld>; ++p) {
    if (trouble != kFine) continue;
    const Part<T> shard = shard_of<T>(m, m.out, sender_at(p, m.view.group.rank));
    store_to<T, kWhole>(shard, index, with_marked_sentinels(packs[p], marks[p]));
  }
  return trouble;
}

// The group has failed, now or before: 0xFF in every byte of what this warp owns, and a word for the host. Needs the
// whole warp, whether its threads are in trouble or not.
template <typename T, int kWorld, bool kWhole>
__device__ __forceinline__ void give_up_rows(const Message& m, const Warp& warp, int64_t num_rows, const Start& start,
                                             Trouble trouble) {
  if (!__any_sync(kWholeWarp, trouble != kFine)) return;
#pragma unroll 1
  for (int64_t row = warp.place.index; row < num_rows; row += warp.place.count) {
#pragma unroll 1
    for (int r = 0; r < world_of<kWorld>(m.view.group); ++r) {
      store_to<T, kWhole>(shard_of<T>(m, m.out, r), row * kRowData + warp.lane, sentinel_pack());
    }
  }
  if (trouble != kFine) fail_group(m.view.group, world_of<kWorld>(m.view.group), trouble, m.op, start.epoch());
}

// m.in has m.shard_count elements, m.out m.count, one shard a rank. The whole message lies in the bank: of each sender
// num_rows rows.
template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 1) gather_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const Warp warp = warp_in_grid();
  const int64_t num_rows = (m.num_packs + kRowData - 1) / kRowData;
  const uint32_t stride = static_cast<uint32_t>(num_rows) * kRowPacks * kPackBytes;
  const auto load = [&](int64_t row) { return load_pack<T, kWhole>(m.in, m.shard_count, row * kRowData + warp.lane); };
  const Peers<kWorld> peers(m.view, stride);
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();
  const Start start = read_start<false>(group);
  const uint64_t bank = bank_offset(m.view, start.bank());
  Trouble trouble = start.trouble();
  for (int64_t row = warp.place.index; row < num_rows; row += warp.place.count) {
    const uint4 own = load(row);
    if (__any_sync(kWholeWarp, trouble != kFine)) break;  // the marks need the whole warp
    push_row<kWorld>(peers, warp, bank + row * kRowPacks * kPackBytes, own);
    store_to<T, kWhole>(shard_of<T>(m, m.out, group.rank), row * kRowData + warp.lane, own);
  }
  const Entry entry =
      enter<false>(group, start, static_cast<uint32_t>((world_of<kWorld>(group) - 1) * num_rows * kRowPacks));
  if (trouble == kFine) {
    const Place place = place_in_grid();
    empty_previous(m.view, start, place.index, place.count);
    const uint8_t* rows = banks_of(m.view, group.rank) + bank;
    for (int64_t row = warp.place.index; row < num_rows && trouble == kFine; row += warp.place.count) {
      trouble = receive_row<T, kWorld, kWhole>(m, warp, rows + row * kRowPacks * kPackBytes, stride,
                                               row * kRowData + warp.lane);
    }
  }
  if (!leave(entry)) trouble = kOverlap;
  give_up_rows<T, kWorld, kWhole>(m, warp, num_rows, start, trouble);
}

// For what the bank cannot hold: a tile is one row a warp.
template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, ring_blocks(kWorld))
    gather_ring_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const Warp warp = warp_in_grid();
  const Ring<1> ring{warp.place};  // of rows
  const int64_t num_rows = (m.num_packs + kRowData - 1) / kRowData, num_tiles = ring.num_tiles(num_rows);
  const uint32_t stride = ring.stride() * kRowPacks;
  const Peers<kWorld> peers(m.view, stride);
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const uint64_t bank = bank_offset(m.view, start.bank());
  const Credits<kWorld> credits(m, start, num_tiles);
  Trouble trouble = start.trouble();
  const Place place = place_in_grid();
  if (trouble == kFine) empty_previous(m.view, start, place.index, place.count);
  for (int64_t k = 0; k <= num_tiles; ++k) {
    if (trouble == kFine) trouble = credits.await_credit(k);
    const bool fine = !__any_sync(kWholeWarp, trouble != kFine);  // the marks need the whole warp
    const int64_t row = ring.pack_of(k, 0), before = ring.pack_of(k - 1, 0);
    if (row < num_rows && fine) {
      const int64_t index = row * kRowData + warp.lane;
      const uint4 own = load_pack<T, kWhole>(m.in, m.shard_count, index);
      push_row<kWorld>(peers, warp, bank + ring.offset(k, 0) * kRowPacks, own);
      store_to<T, kWhole>(shard_of<T>(m, m.out, group.rank), index, own);
    }
    if (k == 0) continue;
    if (before < num_rows && fine) {
      uint8_t* const places = banks_of(m.view, group.rank) + (bank + ring.offset(k - 1, 0) * kRowPacks);
      trouble = receive_row<T, kWorld, kWhole>(m, warp, places, stride, before * kRowData + warp.lane);
      __syncwarp();  // the marks have been read by all before one of them empties the place
      empty_places<kWorld>(group, places + warp.lane * kPackBytes, stride);
      if (warp.lane % 16 == 0) empty_places<kWorld>(group, places + warp.marks, stride);
    }
    if (credits.give_credit(k - 1, trouble)) break;
  }
  ptx::launch_next_kernel();
  if (!leave(entry)) trouble = kOverlap;
  give_up_rows<T, kWorld, kWhole>(m, warp, num_rows, start, trouble);
}

}  // namespace sgl_comm::device
