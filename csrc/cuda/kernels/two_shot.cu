// Holds the two-shot kernels: every rank pushes shard o of its message to rank o, which sums it and pushes the sum to
// all (all-reduce); the first half alone is reduce-scatter.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/partition.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::device {

// Where shard `rank` of the result goes. kGather: an all-reduce; else a reduce-scatter, whose output is this rank's
// shard.
template <typename T, bool kGather>
__device__ __forceinline__ Part<T> output_shard(const PushParameters& params, int rank) {
  const Part<T> shard = shard_of<T>(params, params.out, rank);
  return kGather ? shard : Part<T>{params.out, shard.count};
}

// For a group that has failed: NaN in pack j of shard `owner`, where the caller gets that shard.
template <typename T, bool kAligned, bool kGather>
__device__ __forceinline__ void fail_pack(const PushParameters& params, int owner, int64_t j) {
  if (kGather || owner == params.view.group.rank)
    store_to<T, kAligned>(output_shard<T, kGather>(params, owner), j, sentinel_pack());
}

// Receives every peer's pack of this rank's shard from `slots`, sums them, and pushes the sum to each peer's slot at
// `sum_offset`.
template <typename T, int kWorld, bool kAligned, bool kGather>
__device__ __forceinline__ Status reduce_pack(const PushParameters& params, const uint8_t* slots, uint32_t stride,
                                              uint64_t sum_offset, int64_t j, uint4 own) {
  uint4 sum;
  const Status status = receive_and_sum<T, kWorld>(params.view.group, slots, stride, own, sum);
  if (status != kOk) return status;
  if (kGather) Peers<kWorld>(params.view, stride).push(sum_offset, without_sentinel(sum));
  store_to<T, kAligned>(output_shard<T, kGather>(params, params.view.group.rank), j, sum);
  return kOk;
}

// A thread takes a pack, of whichever shard. The launch bounds say how many blocks a multiprocessor must hold: without
// them the compiler spends more registers, and large messages take more rounds. All of the message fits into the
// buffer: num_packs packs of the receiver's shard from each sender; behind all those, num_packs of its sums from each
// sender.
template <typename T, int kWorld, bool kAligned, bool kGather>
__global__ void __launch_bounds__(kTwoShotThreads, kWorld <= 4 ? 8
                                                   : kGather   ? 6
                                                               : 5)
    two_shot_kernel(const __grid_constant__ PushParameters params) {
  const GroupView& group = params.view.group;
  const int rank = group.rank, world = world_of<kWorld>(group);
  const GridPosition position = grid_position();
  const int first = static_cast<int>(position.index), step = static_cast<int>(position.count);
  const int shard_packs = static_cast<int>(params.num_packs), num_packs = world * shard_packs;
  const uint32_t stride = shard_packs * kPackBytes, sums = (world - 1) * stride;
  const auto load = [&](const ShardPack& p) {
    return load_of<T, kAligned>(shard_of<T>(params, params.in, p.owner), p.j);
  };
  const ShardPack mine = shard_pack<kWorld>(first, shard_packs);
  uint8_t* const buffers = buffers_of(params.view, rank);
  const auto target = [&](const ShardPack& p) {
    return buffers_of(params.view, p.owner) + (sender_index(rank, p.owner) * stride + p.j * kPackBytes);
  };
  uint8_t* const first_target = target(mine);
  ptx::wait_for_previous_kernel(reinterpret_cast<uint64_t>(first_target));
  ptx::launch_next_kernel();
  uint4 own{};
  if (first < num_packs) own = load(mine);  // asked for before the epoch
  const Start start = read_start<false>(group);
  const uint64_t buffer = buffer_offset(params.view, start.buffer());
  Status status = start.status();
  if (status == kOk) {
    for (int i = first; i < num_packs; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      if (p.owner == rank) continue;
      ptx::store_relaxed_sys((i == first ? first_target : target(p)) + buffer,
                             without_sentinel(i == first ? own : load(p)));
    }
  }
  const Entry entry = enter<false>(group, start, params.defer ? (kGather ? 2 : 1) * (world - 1) * shard_packs : 0);
  if (status == kOk) {
    empty_previous(params.view, start, first, step);
    for (int i = first; i < num_packs && status == kOk; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      if (p.owner != rank) continue;
      const uint64_t offset = buffer + p.j * kPackBytes;
      status = reduce_pack<T, kWorld, kAligned, kGather>(params, buffers + offset, stride, sums + offset, p.j,
                                                         i == first ? own : load(p));
      if (!params.defer) empty_slots<kWorld>(group, buffers + offset, stride);
    }
    for (int i = first; kGather && i < num_packs && status == kOk; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      if (p.owner == rank) continue;
      uint8_t* const source = buffers + (buffer + sums + sender_index(p.owner, rank) * stride + p.j * kPackBytes);
      uint4 sum;
      status = await_pack(group, source, p.owner, sum);
      if (status != kOk) break;
      if (!params.defer) *reinterpret_cast<uint4*>(source) = sentinel_pack();
      store_to<T, kAligned>(output_shard<T, true>(params, p.owner), p.j, sum);
    }
  }
  if (!leave(entry)) status = kOverlap;
  if (status != kOk) {
#pragma unroll 1
    for (int i = first; i < num_packs; i += step) {
      const ShardPack p = shard_pack<kWorld>(i, shard_packs);
      fail_pack<T, kAligned, kGather>(params, p.owner, p.j);
    }
    fail_group(group, world, status, params.op, start.epoch());
  }
}

// Two-shot for messages that do not fit into the buffer. A thread's tile is pack j of every shard. While tile k is
// pushed, tile k - 1 is summed and its sum pushed, and the sums of tile k - 2 are received.
template <typename T, int kWorld, bool kAligned, bool kGather>
__global__ void __launch_bounds__(kMaxThreads, ring_blocks(kWorld))
    two_shot_ring_kernel(const __grid_constant__ PushParameters params) {
  const GroupView& group = params.view.group;
  const int rank = group.rank, world = world_of<kWorld>(group);
  const GridPosition position = grid_position();
  const Ring<1> ring{position};
  const int64_t num_tiles = ring.num_tiles(params.num_packs);
  const uint32_t stride = ring.stride(), sums = (world - 1) * stride;
  constexpr int kLag = kGather ? 2 : 1;  // tiles between the push and the last poll of one
  ptx::wait_for_previous_kernel();
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const uint64_t buffer = buffer_offset(params.view, start.buffer());
  const Credits<kWorld> credits(params, start, num_tiles);
  uint8_t* const buffers = buffers_of(params.view, rank);
  Status status = start.status();
  if (status == kOk) empty_previous(params.view, start, position.index, position.count);
  uint4 pushed{};
  for (int64_t k = 0; k < num_tiles + kLag; ++k) {
    const uint4 own = pushed;
    const int64_t now = ring.pack_of(k, 0), before = ring.pack_of(k - 1, 0), oldest = ring.pack_of(k - 2, 0);
    uint4 packs[kRanks<kWorld>];
    if (now < params.num_packs) {
#pragma unroll
      for (int o = 0; o < kRanks<kWorld>; ++o) packs[o] = load_of<T, kAligned>(shard_of<T>(params, params.in, o), now);
    }
    if (status == kOk) status = credits.await_credit(k);
    if (now < params.num_packs && status == kOk) {
#pragma unroll
      for (int o = 0; o < kRanks<kWorld>; ++o) {
        if (o == rank) {
          pushed = packs[o];
        } else if (has_rank<kWorld>(group, o)) {
          const uint64_t offset = buffer + sender_index(rank, o) * stride + ring.offset(k, 0);
          ptx::store_relaxed_sys(buffers_of(params.view, o) + offset, without_sentinel(packs[o]));
        }
      }
    }
    if (k >= 1 && before < params.num_packs && status == kOk) {
      const uint64_t offset = buffer + ring.offset(k - 1, 0);
      status = reduce_pack<T, kWorld, kAligned, kGather>(params, buffers + offset, stride, sums + offset, before, own);
      empty_slots<kWorld>(group, buffers + offset, stride);
    }
    if (kGather && k >= 2 && oldest < params.num_packs && status == kOk) {
      uint8_t* const slots = buffers + (buffer + sums + ring.offset(k - 2, 0));
      uint4 packs[kPeers<kWorld>];
      status = await_peers<kWorld>(group, slots, stride, packs, true);
      empty_slots<kWorld>(group, slots, stride);
#pragma unroll
      for (int p = 0; p < kPeers<kWorld>; ++p) {
        if (status == kOk) store_to<T, kAligned>(output_shard<T, true>(params, sender_at(p, rank)), oldest, packs[p]);
      }
    }
    if (k >= kLag && credits.give_credit(k - kLag, status)) break;
  }
  ptx::launch_next_kernel();
  if (!leave(entry)) status = kOverlap;
  if (status != kOk) {
#pragma unroll 1
    for (int64_t j = position.index; j < params.num_packs; j += position.count) {
#pragma unroll 1
      for (int r = 0; r < world; ++r) fail_pack<T, kAligned, kGather>(params, r, j);
    }
    fail_group(group, world, status, params.op, start.epoch());
  }
}

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

namespace {

template <bool kAligned, bool kGather>
PushKernel kernel_for(DType dtype, int world, bool ring) {
  constexpr int kFewestSharing = kAligned ? kNoneSharing : device::kFewestShared;
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<kFewestSharing>(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      return ring ? device::two_shot_ring_kernel<T, kWorld, kAligned, kGather>
                  : device::two_shot_kernel<T, kWorld, kAligned, kGather>;
    });
  });
}

}  // namespace

PushKernel two_shot_kernel(DType dtype, int world, bool aligned, bool ring) {
  return aligned ? kernel_for<true, true>(dtype, world, ring) : kernel_for<false, true>(dtype, world, ring);
}

PushKernel reduce_scatter_kernel(DType dtype, int world, bool aligned, bool ring) {
  return aligned ? kernel_for<true, false>(dtype, world, ring) : kernel_for<false, false>(dtype, world, ring);
}

}  // namespace sgl_comm::cuda
