// Two-shot all-reduce: every rank pushes shard o of its message to rank o, which sums it and pushes the sum to all.
// Its first half alone is reduce-scatter.
#pragma once

#include "cuda/device/message.cuh"
#include "cuda/device/ring.cuh"

namespace sgl_comm::device {

// kGather: all-reduce, else reduce-scatter, whose output is this rank's shard.
template <typename T, bool kGather>
__device__ __forceinline__ Part<T> output_shard(const Message& m, int rank) {
  const Part<T> shard = shard_of<T>(m, m.out, rank);
  return kGather ? shard : Part<T>{m.out, shard.count};
}

// NaN in the pack j of shard `owner`, where the caller gets that shard.
template <typename T, bool kWhole, bool kGather>
__device__ __forceinline__ void give_up_pack(const Message& m, int owner, int64_t j) {
  if (kGather || owner == m.view.group.rank)
    store_to<T, kWhole>(output_shard<T, kGather>(m, owner), j, sentinel_pack());
}

// Receives every peer's pack of this rank's shard, sums, and hands the sum on. `places` are those of the shards; the
// sum goes to `sum_offset` at each peer.
template <typename T, int kWorld, bool kWhole, bool kGather>
__device__ __forceinline__ Trouble reduce_pack(const Message& m, const uint8_t* places, uint32_t stride,
                                               uint64_t sum_offset, int64_t j, uint4 own) {
  uint4 sum;
  const Trouble trouble = receive_and_sum<T, kWorld>(m.view.group, places, stride, own, sum);
  if (trouble != kFine) return trouble;
  if (kGather) Peers<kWorld>(m.view, stride).push(sum_offset, without_sentinel(sum));
  store_to<T, kWhole>(output_shard<T, kGather>(m, m.view.group.rank), j, sum);
  return kFine;
}

// A pack of a message in shards of equal numbers of packs.
struct ShardPack {
  int owner;
  int j;
};
template <int kWorld>
__device__ __forceinline__ ShardPack shard_pack(int index, int shard_packs) {
  int owner = 0;
#pragma unroll
  for (int r = 1; r < kRanks<kWorld>; ++r) owner += index >= r * shard_packs ? 1 : 0;
  return {owner, index - owner * shard_packs};
}

// A thread takes a pack, of whichever shard. A multiprocessor is to hold so many blocks: the compiler would otherwise
// spend more registers, and large messages take more rounds. The whole message lies in the bank: of each sender
// num_packs packs of the receiver's shard; behind all those, of each sender num_packs of its sums.
template <typename T, int kWorld, bool kWhole, bool kGather>
__global__ void __launch_bounds__(kTwoShotThreads, kWorld <= 4 ? 8
                                                   : kGather   ? 6
                                                               : 5) two_shot_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const int rank = group.rank, world = world_of<kWorld>(group);
  const Place place = place_in_grid();
  const int first = static_cast<int>(place.index), step = static_cast<int>(place.count);
  const int shard_packs = static_cast<int>(m.num_packs), num_packs = world * shard_packs;
  const uint32_t stride = shard_packs * kPackBytes, sums = (world - 1) * stride;
  const auto load = [&](const ShardPack& p) { return load_of<T, kWhole>(shard_of<T>(m, m.in, p.owner), p.j); };
  const ShardPack mine = shard_pack<kWorld>(first, shard_packs);
  uint8_t* const banks = banks_of(m.view, rank);
  const auto target = [&](const ShardPack& p) {
    return banks_of(m.view, p.owner) + (place_of_sender(rank, p.owner) * stride + p.j * kPackBytes);
  };
  uint8_t* const first_target = target(mine);
  ptx::wait_for_previous_kernel(reinterpret_cast<uint64_t>(first_target));
  ptx::launch_next_kernel();
  uint4 own{};
  if (first < num_packs) own = load(mine);  // asked for before the epoch
  const Start start = read_start<false>(group);
  const uint64_t bank = bank_offset(m.view, start.bank());
  Trouble trouble = start.trouble();
  if (trouble == kFine) {
    for (int i = first; i < num_packs; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      if (p.owner == rank) continue;
      ptx::store_relaxed_sys((i == first ? first_target : target(p)) + bank,
                             without_sentinel(i == first ? own : load(p)));
    }
  }
  const Entry entry = enter<false>(group, start, m.defer ? (kGather ? 2 : 1) * (world - 1) * shard_packs : 0);
  if (trouble == kFine) {
    empty_previous(m.view, start, first, step);
    for (int i = first; i < num_packs && trouble == kFine; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      if (p.owner != rank) continue;
      const uint64_t offset = bank + p.j * kPackBytes;
      trouble = reduce_pack<T, kWorld, kWhole, kGather>(m, banks + offset, stride, sums + offset, p.j,
                                                        i == first ? own : load(p));
      if (!m.defer) empty_places<kWorld>(group, banks + offset, stride);
    }
    for (int i = first; kGather && i < num_packs && trouble == kFine; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      if (p.owner == rank) continue;
      uint8_t* const source = banks + (bank + sums + place_of_sender(p.owner, rank) * stride + p.j * kPackBytes);
      uint4 sum;
      trouble = await_pack(group, source, p.owner, sum);
      if (trouble != kFine) break;
      if (!m.defer) *reinterpret_cast<uint4*>(source) = sentinel_pack();
      store_to<T, kWhole>(output_shard<T, true>(m, p.owner), p.j, sum);
    }
  }
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) {
#pragma unroll 1
    for (int i = first; i < num_packs; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      give_up_pack<T, kWhole, kGather>(m, p.owner, p.j);
    }
    fail_group(group, world, trouble, m.op, start.epoch());
  }
}

// For what the bank cannot hold. A thread takes the pack j of every shard, which is its tile. Tile k is pushed, tile
// k - 1 summed and its sum pushed, the sums of tile k - 2 received.
template <typename T, int kWorld, bool kWhole, bool kGather>
__global__ void __launch_bounds__(kMaxThreads, ring_blocks(kWorld))
    two_shot_ring_kernel(const __grid_constant__ Message m) {
  const GroupView& group = m.view.group;
  const int rank = group.rank, world = world_of<kWorld>(group);
  const Place place = place_in_grid();
  const Ring<1> ring{place};
  const int64_t num_tiles = ring.num_tiles(m.num_packs);
  const uint32_t stride = ring.stride(), sums = (world - 1) * stride;
  constexpr int kLag = kGather ? 2 : 1;  // tiles between the push and the last poll of one
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const uint64_t bank = bank_offset(m.view, start.bank());
  const Credits<kWorld> credits(m, start, num_tiles);
  uint8_t* const banks = banks_of(m.view, rank);
  Trouble trouble = start.trouble();
  if (trouble == kFine) empty_previous(m.view, start, place.index, place.count);
  uint4 pushed{};
  for (int64_t k = 0; k < num_tiles + kLag; ++k) {
    const uint4 own = pushed;
    const int64_t now = ring.pack_of(k, 0), before = ring.pack_of(k - 1, 0), oldest = ring.pack_of(k - 2, 0);
    uint4 packs[kRanks<kWorld>];
    if (now < m.num_packs) {
#pragma unroll
      for (int o = 0; o < kRanks<kWorld>; ++o) packs[o] = load_of<T, kWhole>(shard_of<T>(m, m.in, o), now);
    }
    if (trouble == kFine) trouble = credits.await_credit(k);
    if (now < m.num_packs && trouble == kFine) {
#pragma unroll
      for (int o = 0; o < kRanks<kWorld>; ++o) {
        if (o == rank) {
          pushed = packs[o];
        } else if (has_rank<kWorld>(group, o)) {
          const uint64_t offset = bank + place_of_sender(rank, o) * stride + ring.offset(k, 0);
          ptx::store_relaxed_sys(banks_of(m.view, o) + offset, without_sentinel(packs[o]));
        }
      }
    }
    if (k >= 1 && before < m.num_packs && trouble == kFine) {
      const uint64_t offset = bank + ring.offset(k - 1, 0);
      trouble = reduce_pack<T, kWorld, kWhole, kGather>(m, banks + offset, stride, sums + offset, before, own);
      empty_places<kWorld>(group, banks + offset, stride);
    }
    if (kGather && k >= 2 && oldest < m.num_packs && trouble == kFine) {
      uint8_t* const places = banks + (bank + sums + ring.offset(k - 2, 0));
      uint4 packs[kPeers<kWorld>];
      trouble = await_peers<kWorld>(group, places, stride, packs, true);
      empty_places<kWorld>(group, places, stride);
#pragma unroll
      for (int p = 0; p < kPeers<kWorld>; ++p) {
        if (trouble == kFine) store_to<T, kWhole>(output_shard<T, true>(m, sender_at(p, rank)), oldest, packs[p]);
      }
    }
    if (k >= kLag && credits.give_credit(k - kLag, trouble)) break;
  }
  ptx::launch_next_kernel();
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) {
#pragma unroll 1
    for (int64_t j = place.index; j < m.num_packs; j += place.count) {
#pragma unroll 1
      for (int r = 0; r < world; ++r) give_up_pack<T, kWhole, kGather>(m, r, j);
    }
    fail_group(group, world, trouble, m.op, start.epoch());
  }
}

}  // namespace sgl_comm::device
