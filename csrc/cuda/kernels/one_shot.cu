// Holds the one-shot all-reduce kernels: every rank pushes all of its message to every peer and sums what it was sent.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/layout.cuh"
#include "cuda/device/partition.cuh"
#include "cuda/device/ring.cuh"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::device {

// For a group that has failed, now or before: NaN in all elements that this thread would have written, and a fault for
// the host.
template <typename Layout, int kWorld, typename Parameters>
__device__ __forceinline__ void fail_packs(const Parameters& params, const GridPosition& position, const Start& start,
                                           Status status) {
#pragma unroll 1
  for (int64_t i = position.index; i < params.num_packs; i += position.count)
    Layout::store_existing(params, i, sentinel_pack());
  fail_group(params.view.group, world_of<kWorld>(params.view.group), status, params.op, start.epoch());
}

// All of the message fits into the buffer, num_packs of each sender, one sender after the other; a thread has one pack
// or none. What is seldom needed stands behind the last return: code that is jumped over takes time, too.
template <typename T, int kWorld>
__global__ void __launch_bounds__(kMaxThreads, 1) one_shot_kernel(const __grid_constant__ PushParameters params) {
  const GroupView& group = params.view.group;
  const int world = world_of<kWorld>(group);
  const uint32_t rank = ptx::in_register(group.rank), num_packs = static_cast<uint32_t>(params.num_packs);
  const uint32_t index = ptx::in_register(blockIdx.x * blockDim.x + threadIdx.x), stride = num_packs * kPackBytes;
  const bool mine = index < num_packs;
  const uint4* const in = ptx::in_register(static_cast<const uint4*>(params.in) + index);
  uint4* const out = ptx::in_register(static_cast<uint4*>(params.out) + index);
  uint8_t* const buffers = ptx::in_register(buffers_of(params.view, group.rank));
  const Peers<kWorld> peers(params.view, stride);
  ptx::wait_for_previous_kernel(peers.ready() | reinterpret_cast<uint64_t>(buffers) | reinterpret_cast<uint64_t>(in) |
                                reinterpret_cast<uint64_t>(out) | rank);
  ptx::launch_next_kernel();
  uint4 own{}, received[kPeers<kWorld>];
  if (mine) own = ptx::load_input(in);  // asked for before the epoch
  const Start start = read_start<false>(group);
  const uint64_t offset = buffer_offset(params.view, start.buffer()) + index * kPackBytes;
  uint8_t* const slots = buffers + offset;
  const bool ok = start.abort == 0 && start.previous_ended();
  if (ok && mine) peers.push(offset, without_sentinel(own));
  const Entry entry = enter<false>(group, start, params.defer ? (world - 1) * num_packs : 0);
  bool arrived = !mine;
  if (ok) {
    empty_previous(params.view, start, index, gridDim.x * blockDim.x);
    if (mine) {
      arrived = poll_peers<kWorld>(group, slots, stride, received);
      if (arrived && !params.defer) empty_slots<kWorld>(group, slots, stride);
      *out = sum_of_peers<T, kWorld>(group, received, own, rank);
    }
    if (arrived && leave(entry)) return;
  }
  Status status = start.status();
  if (arrived) {
    if (status == kOk) status = kOverlap;
  } else if (status == kOk) {
    status = await_missing<kWorld>(group, slots, stride, received);
    if (status == kOk) {
      if (!params.defer) empty_slots<kWorld>(group, slots, stride);
      *out = sum_of_peers<T, kWorld>(group, received, own, rank);
      if (leave(entry)) return;
      status = kOverlap;
    }
  }
  if (mine) *out = sentinel_pack();
  fail_group(group, world, status, params.op, start.epoch());
}

// One-shot for tensors of any alignment, length and strides, with any number of packs a thread. Ranks need not agree on
// the grid, which for strided tensors is another: a pack's slot follows from its number alone, and a thread pushes all
// of its packs before it waits for one.
template <typename Layout, int kWorld>
__global__ void __launch_bounds__(kMaxThreads, 1)
    one_shot_loop_kernel(const __grid_constant__ typename Layout::template ParametersOf<PushParameters> params) {
  const GroupView& group = params.view.group;
  const GridPosition position = grid_position();
  const int first = static_cast<int>(position.index), step = static_cast<int>(position.count);
  const int num_packs = static_cast<int>(params.num_packs), world = world_of<kWorld>(group);
  const uint32_t stride = num_packs * kPackBytes;
  const Peers<kWorld> peers(params.view, stride);
  uint8_t* const buffers = buffers_of(params.view, group.rank);
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();
  uint4 own{};
  if (first < num_packs) own = Layout::load_existing(params, first);  // asked for before the epoch
  const auto pack = [&](int i) { return i == first ? own : Layout::load_existing(params, i); };
  const Start start = read_start<true>(group);
  const uint64_t buffer = buffer_offset(params.view, start.buffer());
  Status status = start.status();
  if (status == kOk) {
    for (int i = first; i < num_packs; i += step) peers.push(buffer + i * kPackBytes, without_sentinel(pack(i)));
  }
  const Entry entry = enter<true>(group, start, params.defer ? (world - 1) * num_packs : 0);
  if (status == kOk) {
    empty_previous(params.view, start, first, step);
    for (int i = first; i < num_packs; i += step) {
      uint8_t* const slots = buffers + (buffer + i * kPackBytes);
      uint4 sum;
      status = receive_and_sum<typename Layout::Element, kWorld>(group, slots, stride, pack(i), sum);
      if (status != kOk) break;
      if (!params.defer) empty_slots<kWorld>(group, slots, stride);
      Layout::store_existing(params, i, sum);
    }
  }
  if (!leave(entry)) status = kOverlap;
  if (status != kOk) fail_packs<Layout, kWorld>(params, position, start, status);
}

// One-shot for messages that do not fit into the buffer: they go through a ring in tiles of kOneShotTile packs a
// thread.
constexpr int kOneShotTile = 2;

template <typename T, int kWorld, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads, ring_blocks(kWorld))
    one_shot_ring_kernel(const __grid_constant__ PushParameters params) {
  const GroupView& group = params.view.group;
  const GridPosition position = grid_position();
  const Ring<kOneShotTile> ring{position};
  const int64_t num_tiles = ring.num_tiles(params.num_packs);
  const Peers<kWorld> peers(params.view, ring.stride());
  uint4 pushed[kOneShotTile], own[kOneShotTile], received[kOneShotTile][kPeers<kWorld>];
  const auto load = [&](int64_t k) {
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      own[u] = pushed[u];
      const int64_t i = ring.pack_of(k, u);
      if (i < params.num_packs) pushed[u] = load_existing<T, kAligned>(params.in, params.count, i);
    }
  };
  ptx::wait_for_previous_kernel();
  load(0);  // asked for before the epoch
  const Start start = read_start<true>(group);
  const Entry entry = enter<true>(group, start, 0);
  const uint64_t buffer = buffer_offset(params.view, start.buffer());
  const Credits<kWorld> credits(params, start, num_tiles);
  Status status = start.status();
  if (status == kOk) empty_previous(params.view, start, position.index, position.count);
  for (int64_t k = 0; k <= num_tiles; ++k) {
    if (k > 0) load(k);
    if (status == kOk) status = credits.await_credit(k);
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      if (status == kOk && ring.pack_of(k, u) < params.num_packs) {
        peers.push(buffer + ring.offset(k, u), without_sentinel(pushed[u]));
      }
    }
    if (k == 0) continue;
    const auto slots = [&](int u) { return buffers_of(params.view, group.rank) + (buffer + ring.offset(k - 1, u)); };
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) fetch_peers<kWorld>(group, slots(u), ring.stride(), received[u]);
#pragma unroll
    for (int u = 0; u < kOneShotTile; ++u) {
      const int64_t i = ring.pack_of(k - 1, u);
      if (i >= params.num_packs || status != kOk) continue;
      status = await_fetched<kWorld>(group, slots(u), ring.stride(), received[u]);
      empty_slots<kWorld>(group, slots(u), ring.stride());
      store_existing<T, kAligned>(params.out, params.count, i,
                                  sum_of_peers<T, kWorld>(group, received[u], own[u], group.rank));
    }
    if (credits.give_credit(k - 1, status)) break;
  }
  ptx::launch_next_kernel();
  if (!leave(entry)) status = kOverlap;
  if (status != kOk) fail_packs<RowMajor<T, kAligned>, kWorld>(params, position, start, status);
}

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

namespace {

PushKernel aligned_kernel(DType dtype, int world, Rounds rounds) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      switch (rounds) {
        case Rounds::kOne:
          return device::one_shot_kernel<T, kWorld>;
        case Rounds::kMany:
          return device::one_shot_loop_kernel<device::RowMajor<T, true>, kWorld>;
        case Rounds::kRing:
          return device::one_shot_ring_kernel<T, kWorld, true>;
      }
      fail("sgl_comm: no one-shot kernel for rounds of kind ", static_cast<int>(rounds));
    });
  });
}

PushKernel unaligned_kernel(DType dtype, int world, bool ring) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<device::kFewestShared>(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      return ring ? device::one_shot_ring_kernel<T, kWorld, false>
                  : device::one_shot_loop_kernel<device::RowMajor<T, false>, kWorld>;
    });
  });
}

}  // namespace

PushKernel one_shot_kernel(DType dtype, int world, bool aligned, Rounds rounds) {
  return aligned ? aligned_kernel(dtype, world, rounds) : unaligned_kernel(dtype, world, rounds == Rounds::kRing);
}

StridedKernel strided_one_shot_kernel(DType dtype, int world) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<device::kFewestShared + 1>(world, [&](auto n) -> StridedKernel {
      return device::one_shot_loop_kernel<device::Strided<DeviceType<d.value>>, n.value>;
    });
  });
}

}  // namespace sgl_comm::cuda
