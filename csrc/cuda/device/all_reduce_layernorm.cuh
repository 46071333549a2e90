// Fused all-reduce, residual and norm: the push protocol's sums, one- or two-shot, and norm.cuh's rows in one launch.
#pragma once

#include "cuda/device/message.cuh"
#include "cuda/device/norm.cuh"
#include "cuda/device/two_shot.cuh"

namespace sgl_comm::device {

// Rows of `hidden` elements, a multiple of kGroup; every array is 16-byte aligned.
struct LayerNormMessage {
  PushView view;
  const void* in;
  const void* residual;
  Weights weight, bias;
  void* normed;
  void* new_residual;
  int rows, hidden;
  int shard_packs;  // two-shot: packs of the message that are each rank's to sum
  Norm norm;
  bool defer;  // leave the bank full for the next launch to empty
};

// Waits for the sum of pack `i`, whose own part is `own`. One-shot: the whole message lies in the bank, as in
// one_shot.cuh. Two-shot: as in two_shot.cuh, its owner sums it and passes the sum on.
template <typename T, int kWorld, bool kTwoShot>
__device__ __forceinline__ Trouble sum_pack(const LayerNormMessage& m, const Peers<kWorld>& peers, uint64_t bank,
                                            uint32_t stride, int i, uint4 own, uint4& sum) {
  const GroupView& group = m.view.group;
  uint8_t* const banks = banks_of(m.view, group.rank);
  const ShardPack p = kTwoShot ? shard_pack<kWorld>(i, m.shard_packs) : ShardPack{group.rank, i};
  const uint32_t sums = (kWorld - 1) * stride;
  if (p.owner == group.rank) {
    uint8_t* const places = banks + (bank + p.j * kPackBytes);
    const Trouble trouble = receive_and_sum<T, kWorld>(group, places, stride, own, sum);
    if (!m.defer) empty_places<kWorld>(places, stride);
    if (kTwoShot && trouble == kFine) peers.push(bank + sums + p.j * kPackBytes, without_sentinel(sum));
    return trouble;
  }
  uint8_t* const source = banks + (bank + sums + place_of_sender(p.owner, group.rank) * stride + p.j * kPackBytes);
  const Trouble trouble = await_pack(group, source, p.owner, sum);
  if (!m.defer) *reinterpret_cast<uint4*>(source) = sentinel_pack();
  return trouble;
}

// A row is a block's, or a cluster's; a thread has kGroups groups of it at most. A thread that has missed a peer goes
// on with NaN, so that the block stays together; its rows become NaN.
template <typename T, int kWorld, bool kTwoShot, int kGroups>
__global__ void __launch_bounds__(kMaxThreads, 1)
    all_reduce_layernorm_kernel(const __grid_constant__ LayerNormMessage m) {
  constexpr int kPacks = kGroupPacks<T>;
  __shared__ float trees[2][kTree];
  const GroupView& group = m.view.group;
  RowSum row_sum(trees);
  const int slot = row_sum.slot(), slots = row_sum.num_slots();
  const int groups = m.hidden / kGroup, num_packs = m.rows * groups * kPacks;
  const int row_step = gridDim.x * blockDim.x / slots, first_row = blockIdx.x * blockDim.x / slots;
  const uint32_t stride = (kTwoShot ? m.shard_packs : num_packs) * kPackBytes;
  const Peers<kWorld> peers(m.view, stride);
  const auto has = [&](int u) { return slot + u * slots < groups; };
  const auto pack_at = [&](int row, int u, int q) { return (row * groups + slot + u * slots) * kPacks + q; };
  const auto load = [&](const void* array, int i) { return ptx::load_input(static_cast<const uint4*>(array) + i); };

  ptx::wait_for_previous_kernel(peers.ready());
  ptx::launch_next_kernel();
  uint4 own[kGroups * kPacks]{}, residual[kGroups * kPacks]{};
  const auto load_row = [&](uint4(&packs)[kGroups * kPacks], const void* array, int row) {
#pragma unroll
    for (int n = 0; n < kGroups * kPacks; ++n) {
      if (has(n / kPacks)) packs[n] = load(array, pack_at(row, n / kPacks, n % kPacks));
    }
  };
  load_row(own, m.in, first_row);  // asked for before the epoch
  const Start start = read_start<false>(group);
  const uint64_t bank = bank_offset(m.view, start.bank());
  Trouble trouble = start.trouble();
  if (trouble == kFine) {
    for (int row = first_row; row < m.rows; row += row_step) {
      uint4 packs[kGroups * kPacks];
#pragma unroll
      for (int n = 0; n < kGroups * kPacks; ++n) packs[n] = own[n];
      if (row != first_row) load_row(packs, m.in, row);
#pragma unroll
      for (int n = 0; n < kGroups * kPacks; ++n) {
        if (!has(n / kPacks)) continue;
        const int i = pack_at(row, n / kPacks, n % kPacks);
        const ShardPack p = kTwoShot ? shard_pack<kWorld>(i, m.shard_packs) : ShardPack{group.rank, i};
        if (!kTwoShot) {
          peers.push(bank + i * kPackBytes, without_sentinel(packs[n]));
        } else if (p.owner != group.rank) {
          const uint32_t offset = place_of_sender(group.rank, p.owner) * stride + p.j * kPackBytes;
          ptx::store_relaxed_sys(banks_of(m.view, p.owner) + (bank + offset), without_sentinel(packs[n]));
        }
      }
    }
  }
  const uint32_t left_full = (kWorld - 1) * (kTwoShot ? 2 * m.shard_packs : num_packs);
  const Entry entry = enter<false>(group, start, m.defer ? left_full : 0);
  load_row(residual, m.residual, first_row);
  float weight[kGroups][kGroup], bias[kGroups][kGroup];
#pragma unroll
  for (int u = 0; u < kGroups; ++u) {
    if (!has(u)) continue;
    load_weights<T, true>(m.weight, m.hidden, slot + u * slots, weight[u]);
    if (m.bias.data != nullptr) load_weights<T, true>(m.bias, m.hidden, slot + u * slots, bias[u]);
  }
  if (trouble == kFine) {
    empty_previous(m.view, start, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  }
  row_sum.begin();

  for (int row = first_row; row < m.rows; row += row_step) {
    if (row != first_row) {
      load_row(own, m.in, row);
      load_row(residual, m.residual, row);
    }
    float v[kGroups][kGroup];
#pragma unroll
    for (int n = 0; n < kGroups * kPacks; ++n) {
      uint4 pack = sentinel_pack();
      float lanes[T::kLanes], other[T::kLanes];
      if (has(n / kPacks)) {
        const int i = pack_at(row, n / kPacks, n % kPacks);
        if (trouble == kFine) trouble = sum_pack<T, kWorld, kTwoShot>(m, peers, bank, stride, i, own[n], pack);
        if (trouble != kFine) pack = sentinel_pack();
        T::unpack(pack, lanes);
        T::unpack(residual[n], other);
#pragma unroll
        for (int k = 0; k < T::kLanes; ++k) lanes[k] = add(lanes[k], other[k]);
        pack = T::pack(lanes);
        static_cast<uint4*>(m.new_residual)[i] = pack;
        T::unpack(pack, lanes);
      }
#pragma unroll
      for (int k = 0; k < T::kLanes; ++k) {
        v[n / kPacks][n % kPacks * T::kLanes + k] = has(n / kPacks) ? lanes[k] : 0.0f;
      }
    }
    const auto total = [&](auto&& value) {
      float sum = value(v[0]);
#pragma unroll
      for (int u = 1; u < kGroups; ++u) {
        if (has(u)) sum = add(sum, value(v[u]));
      }
      return row_sum.of(sum);
    };
    if (m.norm.layer) {
      const float sum = total([](const float(&x)[kGroup]) { return sum_of_group(x); });
      const float mean = divide(sum, static_cast<float>(m.hidden));
#pragma unroll
      for (int u = 0; u < kGroups; ++u) subtract_mean(v[u], mean, has(u) ? kGroup : 0);
    }
    const float squares = total([](const float(&x)[kGroup]) { return sum_of_squares(x); });
    const float factor = norm_factor(squares, m.hidden, m.norm.eps);
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
      if (!has(u)) continue;
      scale(v[u], factor, weight[u], m.norm.weight_offset);
      if (m.bias.data != nullptr) {
#pragma unroll
        for (int k = 0; k < kGroup; ++k) v[u][k] = add(v[u][k], bias[u][k]);
      }
      store_group<T, true>(static_cast<uint4*>(m.normed) + row * groups * kPacks, m.hidden, slot + u * slots, v[u]);
    }
  }
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) fail_group(group, kWorld, trouble, kAllReduceLayerNorm, start.epoch());
}

}  // namespace sgl_comm::device
