// Holds the pull kernels: ranks read each other's inputs through peer pointers, between barriers.
//
// Who writes what, when. Rank p's workspace has flags, one for each block and peer; a staging area for its input; and
// an area for its sums. A block of rank p writes the flag of the same block at every peer. The input lies in p's own
// tensor, or in its staging area, where the kernel copies it first.
// Why reuse is safe. A launch has two barriers, each of all ranks' blocks of one number. Before the first a block has
// copied its packs; a peer's block of that number reads just those. No rank passes the second before every rank has
// read its inputs (in two-shot: has made its sums), so what follows may overwrite them; the sums of a launch are
// overwritten after the first barrier of the next, which a rank reaches when it has read them. Flags only grow: by 2 an
// epoch. Raising a flag is a release, waiting for it an acquire; a block's own barrier stands on either side.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/partition.cuh"
#include "cuda/device/push.cuh"
#include "cuda/kernels/pull_kernels.h"

namespace sgl_comm::device {

__device__ __forceinline__ unsigned long long* flag_of(const GroupView& group, int owner, int sender) {
  return reinterpret_cast<unsigned long long*>(group.workspace[owner] + kControlBytes) + blockIdx.x * kMaxWorld +
         sender;
}

// A barrier of every rank's block of this number: what they wrote before it is seen after it. `phase` is 1 or 2. Needs
// all threads of the block. A thread whose peer does not come fails the group at once, so that the others find it
// failed.
template <int kWorld>
__device__ __forceinline__ Status barrier_of_ranks(const GroupView& group, const Start& start, int phase) {
  __syncthreads();
  bool late = false;
  const int peer = threadIdx.x;
  const int world = world_of<kWorld>(group);
  if (peer < world && peer != group.rank) {
    const unsigned long long value = 2 * start.epoch() + phase;
    ptx::store_release_sys(flag_of(group, peer, group.rank), value);
    const unsigned long long* flag = flag_of(group, group.rank, peer);
    late = !await(group, [&] { return ptx::load_acquire_sys(flag) < value; });
    if (late) fail_group(group, world, peer, Op::kCustomAllReduceV1, start.epoch());
  }
  return __syncthreads_or(late) ? kFailedBefore : kOk;
}

// Finds where the ranks' inputs are; the entry of a captured call may not have been filled in yet. Needs all threads of
// the block, which get the same status. A thread that cannot go on fails the group.
template <int kWorld>
__device__ __forceinline__ Status find_inputs(const PullParameters& params, const Start& start,
                                              const void* (&inputs)[kRanks<kWorld>]) {
  bool all = true;
#pragma unroll
  for (int r = 0; r < kRanks<kWorld>; ++r) {
    inputs[r] = nullptr;
    if (!has_rank<kWorld>(params.view.group, r)) continue;
    inputs[r] = params.entry != nullptr ? params.entry->input[r] : params.view.group.workspace[r] + params.view.staging;
    all &= inputs[r] != nullptr;
  }
  const Status status = start.status() != kOk ? start.status() : all ? kOk : kUnregistered;
  if (status != kOk)
    fail_group(params.view.group, world_of<kWorld>(params.view.group), status, Op::kCustomAllReduceV1, start.epoch());
  return __syncthreads_or(status != kOk) ? kFailedBefore : kOk;
}

__device__ __forceinline__ uint4* staging_of(const PullParameters& params) {
  return reinterpret_cast<uint4*>(params.view.group.workspace[params.view.group.rank] + params.view.staging);
}

// The pack `index` of every rank's input, summed in rank order. A peer's lies 16-byte aligned and in full packs.
template <typename T, int kWorld>
__device__ __forceinline__ uint4 pull_and_sum(const PullParameters& params, const void* const (&inputs)[kRanks<kWorld>],
                                              int64_t index, uint4 own) {
  uint4 packs[kRanks<kWorld>];
#pragma unroll
  for (int r = 0; r < kRanks<kWorld>; ++r) {
    if (!has_rank<kWorld>(params.view.group, r)) continue;
    packs[r] = r == params.view.group.rank ? own : ptx::load_relaxed_sys(static_cast<const uint4*>(inputs[r]) + index);
  }
  return sum_in_order<T>(packs, [&](int r) { return has_rank<kWorld>(params.view.group, r); });
}

// For a group that has failed: NaN in all packs of `num_shards` shards that this thread would have written.
template <typename T, bool kAligned>
__device__ __forceinline__ void fail_pull(const PullParameters& params, int num_shards, const GridPosition& position) {
#pragma unroll 1
  for (int64_t j = position.index; j < params.num_packs; j += position.count) {
#pragma unroll 1
    for (int r = 0; r < num_shards; ++r)
      store_pack<T, kAligned>(params.out, params.count, r * params.num_packs + j, sentinel_pack());
  }
}

// Every rank reads all inputs and sums all of them.
template <typename T, int kWorld, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 1) one_shot_pull_kernel(const __grid_constant__ PullParameters params) {
  const GroupView& group = params.view.group;
  const GridPosition position = grid_position();
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const void* inputs[kRanks<kWorld>];
  Status status = find_inputs<kWorld>(params, start, inputs);
  if (status == kOk) {
    for (int64_t i = position.index; params.stage && i < params.num_packs; i += position.count) {
      staging_of(params)[i] = load_pack<T, kAligned>(params.in, params.count, i);
    }
    status = barrier_of_ranks<kWorld>(group, start, 1);
  }
  ptx::launch_next_kernel();
  if (status == kOk) {
    for (int64_t i = position.index; i < params.num_packs; i += position.count) {
      const uint4 own = load_pack<T, kAligned>(params.in, params.count, i);
      store_pack<T, kAligned>(params.out, params.count, i, pull_and_sum<T, kWorld>(params, inputs, i, own));
    }
    status = barrier_of_ranks<kWorld>(group, start, 2);
  }
  if (status != kOk) fail_pull<T, kAligned>(params, 1, position);
  if (!leave(entry)) fail_group(group, world_of<kWorld>(group), kOverlap, Op::kCustomAllReduceV1, start.epoch());
}

// Every rank sums one shard, then reads the others' sums. A thread takes the pack j of every shard.
template <typename T, int kWorld, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, 1) two_shot_pull_kernel(const __grid_constant__ PullParameters params) {
  const GroupView& group = params.view.group;
  const GridPosition position = grid_position();
  const int64_t mine = group.rank * params.num_packs;
  const auto exists = [&](int64_t i) { return i * kElements<T> < params.count; };
  const auto sums_of = [&](int r) { return reinterpret_cast<uint4*>(group.workspace[r] + params.view.sums); };
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const void* inputs[kRanks<kWorld>];
  Status status = find_inputs<kWorld>(params, start, inputs);
  if (status == kOk) {
    for (int64_t j = position.index; params.stage && j < params.num_packs; j += position.count) {
#pragma unroll 1
      for (int r = 0; r < world_of<kWorld>(group); ++r) {
        const int64_t i = r * params.num_packs + j;
        if (exists(i)) staging_of(params)[i] = load_pack<T, kAligned>(params.in, params.count, i);
      }
    }
    status = barrier_of_ranks<kWorld>(group, start, 1);
  }
  if (status == kOk) {
    for (int64_t j = position.index; j < params.num_packs && exists(mine + j); j += position.count) {
      const uint4 own = load_pack<T, kAligned>(params.in, params.count, mine + j);
      sums_of(group.rank)[j] = pull_and_sum<T, kWorld>(params, inputs, mine + j, own);
    }
    status = barrier_of_ranks<kWorld>(group, start, 2);
  }
  ptx::launch_next_kernel();
  for (int64_t j = position.index; status == kOk && j < params.num_packs; j += position.count) {
    uint4 packs[kRanks<kWorld>];
#pragma unroll
    for (int r = 0; r < kRanks<kWorld>; ++r) {
      if (has_rank<kWorld>(group, r)) packs[r] = ptx::load_relaxed_sys(sums_of(r) + j);
    }
#pragma unroll
    for (int r = 0; r < kRanks<kWorld>; ++r)
      store_pack<T, kAligned>(params.out, params.count, r * params.num_packs + j, packs[r]);
  }
  if (status != kOk) fail_pull<T, kAligned>(params, world_of<kWorld>(group), position);
  if (!leave(entry)) fail_group(group, world_of<kWorld>(group), kOverlap, Op::kCustomAllReduceV1, start.epoch());
}

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

PullKernel pull_kernel(DType dtype, int world, bool aligned, bool one_shot) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<device::kFewestShared>(world, [&](auto n) -> PullKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (one_shot) {
        return aligned ? device::one_shot_pull_kernel<T, kWorld, true> : device::one_shot_pull_kernel<T, kWorld, false>;
      }
      return aligned ? device::two_shot_pull_kernel<T, kWorld, true> : device::two_shot_pull_kernel<T, kWorld, false>;
    });
  });
}

}  // namespace sgl_comm::cuda
