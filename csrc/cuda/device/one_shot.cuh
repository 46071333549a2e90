// One-shot all-reduce: every rank pushes all of its message to every peer and sums what it was sent.
#pragma once

#include "cuda/device/message.cuh"
#include "cuda/device/ring.cuh"

namespace sgl_comm::device {

// The group has failed, now or before: NaN for the caller in all that this thread owns, and a word for the host.
template <typename T, int kWorld, bool kWhole>
__device__ __forceinline__ void give_up_packs(const Message& m, const Place& place, const Start& start,
                                              Trouble trouble) {
#pragma unroll 1
  for (int64_t i = place.index; i < m.num_packs; i += place.count) {
    store_pack<T, kWhole>(m.out, m.count, i, sentinel_pack());
  }
  fail_group(m.view.group, kWorld, trouble, m.op, start.epoch);
}

// The whole message lies in the bank: of each sender num_packs, one after the other.
template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) one_shot_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const Place place = place_in_grid();
  const int first = static_cast<int>(place.index), step = static_cast<int>(place.count);
  const int num_packs = static_cast<int>(m.num_packs);
  const uint32_t stride = num_packs * kPackBytes;
  ptx::wait_for_previous_kernel();
  uint4 own{};
  if (first < num_packs) own = load_existing<T, kWhole>(m.in, m.count, first);  // asked for before the epoch
  const auto pack = [&](int i) { return i == first ? own : load_existing<T, kWhole>(m.in, m.count, i); };
  const Start start = read_start(group);
  Trouble trouble = start.trouble;
  if (trouble == kFine) {
    for (int i = first; i < num_packs; i += step) {
      push_to_peers<kWorld>(m.view, start.bank, stride, i * kPackBytes, without_sentinel(pack(i)));
    }
  }
  const Entry entry = enter(group, start, m.defer ? (kWorld - 1) * num_packs : 0);
  ptx::launch_next_kernel();
  if (trouble == kFine) {
    empty_previous(m.view, start, first, step);
    uint8_t* const bank = bank_of(m.view, group.rank, start.bank);
    for (int i = first; i < num_packs; i += step) {
      uint8_t* const places = bank + i * kPackBytes;
      uint4 sum;
      trouble = receive_and_sum<T, kWorld>(group, places, stride, pack(i), sum);
      if (trouble != kFine) break;
      if (!m.defer) empty_places<kWorld>(places, stride);
      store_existing<T, kWhole>(m.out, m.count, i, sum);
    }
  }
  if (trouble != kFine) give_up_packs<T, kWorld, kWhole>(m, place, start, trouble);
  leave(group, kWorld, start, entry, m.op);
}

// For what the bank cannot hold: a tile is kOneShotTile packs of each thread.
constexpr int kOneShotTile = 2;

template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads) one_shot_ring_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const Place place = place_in_grid();
  const Ring<kOneShotTile> ring{place};
  ptx::wait_for_previous_kernel();
  const Start start = read_start(group);
  const Entry entry = enter(group, start, 0);
  uint8_t* const bank = bank_of(m.view, group.rank, start.bank);
  Trouble trouble = start.trouble;
  if (trouble == kFine) empty_previous(m.view, start, place.index, place.count);
  uint4 pushed[kOneShotTile], own[kOneShotTile];
  for (int64_t k = 0; trouble == kFine && ring.pack_of(k - 1, 0) < m.num_packs; ++k) {
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      own[u] = pushed[u];
      const int64_t i = ring.pack_of(k, u);
      if (i >= m.num_packs) continue;
      pushed[u] = load_existing<T, kWhole>(m.in, m.count, i);
      push_to_peers<kWorld>(m.view, start.bank, ring.stride(), ring.offset(k, u), without_sentinel(pushed[u]));
    }
    if (k == 0) continue;
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      const int64_t i = ring.pack_of(k - 1, u);
      if (i >= m.num_packs || trouble != kFine) continue;
      uint8_t* const places = bank + ring.offset(k - 1, u);
      uint4 sum;
      trouble = receive_and_sum<T, kWorld>(group, places, ring.stride(), own[u], sum);
      empty_places<kWorld>(places, ring.stride());
      store_existing<T, kWhole>(m.out, m.count, i, sum);
    }
    ptx::fence_acq_rel_sys();
  }
  ptx::launch_next_kernel();
  if (trouble != kFine) give_up_packs<T, kWorld, kWhole>(m, place, start, trouble);
  leave(group, kWorld, start, entry, m.op);
}

}  // namespace sgl_comm::device
