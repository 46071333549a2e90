// One-shot all-reduce: every rank pushes all of its message to every peer and sums what it was sent.
#pragma once

#include "cuda/device/layout.cuh"
#include "cuda/device/message.cuh"
#include "cuda/device/ring.cuh"

namespace sgl_comm::device {

// The group has failed, now or before: NaN for the caller in all that this thread owns, and a word for the host.
template <typename Layout, int kWorld, typename Message>
__device__ __forceinline__ void give_up_packs(const Message& m, const Place& place, const Start& start,
                                              Trouble trouble) {
#pragma unroll 1
  for (int64_t i = place.index; i < m.num_packs; i += place.count) Layout::store_existing(m, i, sentinel_pack());
  fail_group(m.view.group, world_of<kWorld>(m.view.group), trouble, m.op, start.epoch());
}

// The whole message lies in the bank, of each sender num_packs, one after the other; a thread has one pack or none.
// What is seldom needed stands behind the last return: code that is jumped over takes time, too.
template <typename T, int kWorld>
__global__ void __launch_bounds__(kMaxThreads, 1) one_shot_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const int world = world_of<kWorld>(group);
  const uint32_t rank = ptx::in_register(group.rank), num_packs = static_cast<uint32_t>(m.num_packs);
  const uint32_t index = ptx::in_register(blockIdx.x * blockDim.x + threadIdx.x), stride = num_packs * kPackBytes;
  const bool mine = index < num_packs;
  const uint4* const in = ptx::in_register(static_cast<const uint4*>(m.in) + index);
  uint4* const out = ptx::in_register(static_cast<uint4*>(m.out) + index);
  uint8_t* const banks = ptx::in_register(banks_of(m.view, group.rank));
  const Peers<kWorld> peers(m.view, stride);
  ptx::wait_for_previous_kernel(peers.ready() | reinterpret_cast<uint64_t>(banks) | reinterpret_cast<uint64_t>(in) |
                                reinterpret_cast<uint64_t>(out) | rank);
  ptx::launch_next_kernel();
  uint4 own{}, received[kPeers<kWorld>];
  if (mine) own = ptx::load_input(in);  // asked for before the epoch
  const Start start = read_start<false>(group);
  const uint64_t offset = bank_offset(m.view, start.bank()) + index * kPackBytes;
  uint8_t* const places = banks + offset;
  const bool fine = start.abort == 0 && start.previous_ended();
  if (fine && mine) peers.push(offset, without_sentinel(own));
  const Entry entry = enter<false>(group, start, m.defer ? (world - 1) * num_packs : 0);
  bool arrived = !mine;
  if (fine) {
    empty_previous(m.view, start, index, gridDim.x * blockDim.x);
    if (mine) {
      arrived = poll_peers<kWorld>(group, places, stride, received);
      if (arrived && !m.defer) empty_places<kWorld>(group, places, stride);
      *out = sum_of_peers<T, kWorld>(group, received, own, rank);
    }
    if (arrived && leave(entry)) return;
  }
  Trouble trouble = start.trouble();
  if (arrived) {
    if (trouble == kFine) trouble = kOverlap;
  } else if (trouble == kFine) {
    trouble = await_missing<kWorld>(group, places, stride, received);
    if (trouble == kFine) {
      if (!m.defer) empty_places<kWorld>(group, places, stride);
      *out = sum_of_peers<T, kWorld>(group, received, own, rank);
      if (leave(entry)) return;
      trouble = kOverlap;
    }
  }
  if (mine) *out = sentinel_pack();
  fail_group(group, world, trouble, m.op, start.epoch());
}

// The same for tensors of any alignment, length and strides, and with as many packs a thread as it takes. Ranks need
// not agree on the grid, which for strided tensors is another: where a pack goes follows from its number alone, and a
// thread pushes all of its packs before it waits for one.
template <typename Layout, int kWorld>
__global__ void __launch_bounds__(kMaxThreads, 1)
    one_shot_loop_kernel(const __grid_constant__ typename Layout::template MessageOf<Message> m) {
  const GroupView& group = m.view.group;
  const Place place = place_in_grid();
  const int first = static_cast<int>(place.index), step = static_cast<int>(place.count);
  const int num_packs = static_cast<int>(m.num_packs), world = world_of<kWorld>(group);
  const uint32_t stride = num_packs * kPackBytes;
  const Peers<kWorld> peers(m.view, stride);
  uint8_t* const banks = banks_of(m.view, group.rank);
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();
  uint4 own{};
  if (first < num_packs) own = Layout::load_existing(m, first);  // asked for before the epoch
  const auto pack = [&](int i) { return i == first ? own : Layout::load_existing(m, i); };
  const Start start = read_start<true>(group);
  const uint64_t bank = bank_offset(m.view, start.bank());
  Trouble trouble = start.trouble();
  if (trouble == kFine) {
    for (int i = first; i < num_packs; i += step) peers.push(bank + i * kPackBytes, without_sentinel(pack(i)));
  }
  const Entry entry = enter<true>(group, start, m.defer ? (world - 1) * num_packs : 0);
  if (trouble == kFine) {
    empty_previous(m.view, start, first, step);
    for (int i = first; i < num_packs; i += step) {
      uint8_t* const places = banks + (bank + i * kPackBytes);
      uint4 sum;
      trouble = receive_and_sum<typename Layout::Element, kWorld>(group, places, stride, pack(i), sum);
      if (trouble != kFine) break;
      if (!m.defer) empty_places<kWorld>(group, places, stride);
      Layout::store_existing(m, i, sum);
    }
  }
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) give_up_packs<Layout, kWorld>(m, place, start, trouble);
}

// For what the bank cannot hold: a tile is kOneShotTile packs of each thread.
constexpr int kOneShotTile = 2;

template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, ring_blocks(kWorld))
    one_shot_ring_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const Place place = place_in_grid();
  const Ring<kOneShotTile> ring{place};
  const int64_t num_tiles = ring.num_tiles(m.num_packs);
  const Peers<kWorld> peers(m.view, ring.stride());
  uint4 pushed[kOneShotTile], own[kOneShotTile], received[kOneShotTile][kPeers<kWorld>];
  const auto load = [&](int64_t k) {
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      own[u] = pushed[u];
      const int64_t i = ring.pack_of(k, u);
      if (i < m.num_packs) pushed[u] = load_existing<T, kWhole>(m.in, m.count, i);
    }
  };
  ptx::wait_for_previous_kernel();
  load(0);  // asked for before the epoch
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const uint64_t bank = bank_offset(m.view, start.bank());
  const Credits<kWorld> credits(m, start, num_tiles);
  Trouble trouble = start.trouble();
  if (trouble == kFine) empty_previous(m.view, start, place.index, place.count);
  for (int64_t k = 0; k <= num_tiles; ++k) {
    if (k > 0) load(k);
    if (trouble == kFine) trouble = credits.await_credit(k);
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      if (trouble == kFine && ring.pack_of(k, u) < m.num_packs) {
        peers.push(bank + ring.offset(k, u), without_sentinel(pushed[u]));
      }
    }
    if (k == 0) continue;
    const auto places = [&](int u) { return banks_of(m.view, group.rank) + (bank + ring.offset(k - 1, u)); };
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) fetch_peers<kWorld>(group, places(u), ring.stride(), received[u]);
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      const int64_t i = ring.pack_of(k - 1, u);
      if (i >= m.num_packs || trouble != kFine) continue;
      trouble = await_fetched<kWorld>(group, places(u), ring.stride(), received[u]);
      empty_places<kWorld>(group, places(u), ring.stride());
      store_existing<T, kWhole>(m.out, m.count, i, sum_of_peers<T, kWorld>(group, received[u], own[u], group.rank));
    }
    if (credits.give_credit(k - 1, trouble)) break;
  }
  ptx::launch_next_kernel();
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) give_up_packs<RowMajor<T, kWhole>, kWorld>(m, place, start, trouble);
}

}  // namespace sgl_comm::device
