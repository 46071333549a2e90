// The pull protocol: ranks read each other's inputs through peer pointers, between barriers.
//
// Who writes what, when. Rank p's workspace has flags, one for each block and peer; a staging place for its input; and
// a place for its sums. A block of rank p writes the flag of the same block at every peer. The input lies in p's own
// tensor, or in its staging place, where the kernel copies it first.
// Why reuse is safe. A launch has two barriers, each of all ranks' blocks of one number. Before the first a block has
// copied its packs; a peer's block of that number reads just those. No rank passes the second before every rank has
// read its inputs (in two-shot: has made its sums), so what follows may overwrite them; the sums of a launch are
// overwritten after the first barrier of the next, which a rank reaches when it has read them. Flags only grow: by 2 an
// epoch. Raising a flag is a release, waiting for it an acquire; a block's own barrier stands on either side.
#pragma once

#include "cuda/device/message.cuh"

namespace sgl_comm::device {

__device__ __forceinline__ unsigned long long* flag_of(const GroupView& group, int owner, int sender) {
  return reinterpret_cast<unsigned long long*>(group.workspace[owner] + kControlBytes) + blockIdx.x * kMaxRanks +
         sender;
}

// After: every rank's block of this number is here, and what it wrote before is seen. `turn` is 1 or 2. Needs all
// threads of the block. A thread whose peer does not come fails the group at once, so that the others find it failed.
template <int kWorld>
__device__ __forceinline__ Trouble meet(const GroupView& group, const Start& start, int turn) {
  __syncthreads();
  bool late = false;
  const int peer = threadIdx.x;
  const int world = world_of<kWorld>(group);
  if (peer < world && peer != group.rank) {
    const unsigned long long value = 2 * start.epoch() + turn;
    ptx::store_release_sys(flag_of(group, peer, group.rank), value);
    const unsigned long long* flag = flag_of(group, group.rank, peer);
    late = !await(group, [&] { return ptx::load_acquire_sys(flag) < value; });
    if (late) fail_group(group, world, peer, kCustomAllReduceV1, start.epoch());
  }
  return __syncthreads_or(late) ? kFailedBefore : kFine;
}

// Finds where the ranks' inputs are, if the launch can go on; the entry of a captured call may not have been filled in.
// Needs all threads of the block, which goes on as one or not at all. A thread in trouble fails the group.
template <int kWorld>
__device__ __forceinline__ Trouble find_inputs(const PullMessage& m, const Start& start,
                                               const void* (&inputs)[kRanks<kWorld>]) {
  bool all = true;
#pragma unroll
  for (int r = 0; r < kRanks<kWorld>; ++r) {
    inputs[r] = nullptr;
    if (!has_rank<kWorld>(m.view.group, r)) continue;
    inputs[r] = m.entry != nullptr ? m.entry->input[r] : m.view.group.workspace[r] + m.view.staging;
    all &= inputs[r] != nullptr;
  }
  const Trouble trouble = start.trouble() != kFine ? start.trouble() : all ? kFine : kUnregistered;
  if (trouble != kFine)
    fail_group(m.view.group, world_of<kWorld>(m.view.group), trouble, kCustomAllReduceV1, start.epoch());
  return __syncthreads_or(trouble != kFine) ? kFailedBefore : kFine;
}

__device__ __forceinline__ uint4* staging_of(const PullMessage& m) {
  return reinterpret_cast<uint4*>(m.view.group.workspace[m.view.group.rank] + m.view.staging);
}

// The pack `index` of every rank's input, summed in rank order. A peer's lies 16-byte aligned and in whole packs.
template <typename T, int kWorld>
__device__ __forceinline__ uint4 pull_and_sum(const PullMessage& m, const void* const (&inputs)[kRanks<kWorld>],
                                              int64_t index, uint4 own) {
  uint4 packs[kRanks<kWorld>];
#pragma unroll
  for (int r = 0; r < kRanks<kWorld>; ++r) {
    if (!has_rank<kWorld>(m.view.group, r)) continue;
    packs[r] = r == m.view.group.rank ? own : ptx::load_relaxed_sys(static_cast<const uint4*>(inputs[r]) + index);
  }
  return sum_in_order<T>(packs, [&](int r) { return has_rank<kWorld>(m.view.group, r); });
}

// NaN in the pack `index` of `num_shards` shards, for each that this thread owns.
template <typename T, bool kWhole>
__device__ __forceinline__ void give_up_pull(const PullMessage& m, int num_shards, const Place& place) {
#pragma unroll 1
  for (int64_t j = place.index; j < m.num_packs; j += place.count) {
#pragma unroll 1
    for (int r = 0; r < num_shards; ++r) store_pack<T, kWhole>(m.out, m.count, r * m.num_packs + j, sentinel_pack());
  }
}

// Every rank reads all inputs and sums all of them.
template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 1) one_shot_pull_kernel(const __grid_constant__ PullMessage m) {
  const GroupView& group = m.view.group;
  const Place place = place_in_grid();
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const void* inputs[kRanks<kWorld>];
  Trouble trouble = find_inputs<kWorld>(m, start, inputs);
  if (trouble == kFine) {
    for (int64_t i = place.index; m.stage && i < m.num_packs; i += place.count) {
      staging_of(m)[i] = load_pack<T, kWhole>(m.in, m.count, i);
    }
    trouble = meet<kWorld>(group, start, 1);
  }
  ptx::launch_next_kernel();
  if (trouble == kFine) {
    for (int64_t i = place.index; i < m.num_packs; i += place.count) {
      const uint4 own = load_pack<T, kWhole>(m.in, m.count, i);
      store_pack<T, kWhole>(m.out, m.count, i, pull_and_sum<T, kWorld>(m, inputs, i, own));
    }
    trouble = meet<kWorld>(group, start, 2);
  }
  if (trouble != kFine) give_up_pull<T, kWhole>(m, 1, place);
  if (!leave(entry)) fail_group(group, world_of<kWorld>(group), kOverlap, kCustomAllReduceV1, start.epoch());
}

// Every rank sums one shard, then reads the others' sums. A thread takes the pack j of every shard.
template <typename T, int kWorld, bool kWhole>
__global__ void __launch_bounds__(kMaxThreads, 1) two_shot_pull_kernel(const __grid_constant__ PullMessage m) {
  const GroupView& group = m.view.group;
  const Place place = place_in_grid();
  const int64_t mine = group.rank * m.num_packs;
  const auto exists = [&](int64_t i) { return i * kElements<T> < m.count; };
  const auto sums_of = [&](int r) { return reinterpret_cast<uint4*>(group.workspace[r] + m.view.sums); };
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const void* inputs[kRanks<kWorld>];
  Trouble trouble = find_inputs<kWorld>(m, start, inputs);
  if (trouble == kFine) {
    for (int64_t j = place.index; m.stage && j < m.num_packs; j += place.count) {
#pragma unroll 1
      for (int r = 0; r < world_of<kWorld>(group); ++r) {
        const int64_t i = r * m.num_packs + j;
        if (exists(i)) staging_of(m)[i] = load_pack<T, kWhole>(m.in, m.count, i);
      }
    }
    trouble = meet<kWorld>(group, start, 1);
  }
  if (trouble == kFine) {
    for (int64_t j = place.index; j < m.num_packs && exists(mine + j); j += place.count) {
      const uint4 own = load_pack<T, kWhole>(m.in, m.count, mine + j);
      sums_of(group.rank)[j] = pull_and_sum<T, kWorld>(m, inputs, mine + j, own);
    }
    trouble = meet<kWorld>(group, start, 2);
  }
  ptx::launch_next_kernel();
  for (int64_t j = place.index; trouble == kFine && j < m.num_packs; j += place.count) {
    uint4 packs[kRanks<kWorld>];
#pragma unroll
    for (int r = 0; r < kRanks<kWorld>; ++r) {
      if (has_rank<kWorld>(group, r)) packs[r] = ptx::load_relaxed_sys(sums_of(r) + j);
    }
#pragma unroll
    for (int r = 0; r < kRanks<kWorld>; ++r) store_pack<T, kWhole>(m.out, m.count, r * m.num_packs + j, packs[r]);
  }
  if (trouble != kFine) give_up_pull<T, kWhole>(m, world_of<kWorld>(group), place);
  if (!leave(entry)) fail_group(group, world_of<kWorld>(group), kOverlap, kCustomAllReduceV1, start.epoch());
}

}  // namespace sgl_comm::device
