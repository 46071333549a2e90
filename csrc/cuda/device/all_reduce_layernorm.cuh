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
  RowLength length;
  Norm norm;
  bool defer;  // leave the bank full for the next launch to empty
  bool late;   // the next launch may begin only when this one is nearly done, which leaves room for more blocks
};

// Which packs of a row-major array of rows are this thread's: of each row those of its slot, kGroups groups at most.
template <typename T, int kGroups>
struct RowPacks {
  static constexpr int kCount = kGroups * kGroupPacks<T>;  // of a row
  const int slot, slots, groups;

  __device__ __forceinline__ bool has_group(int u) const { return slot + u * slots < groups; }
  __device__ __forceinline__ bool has(int n) const { return has_group(n / kGroupPacks<T>); }
  __device__ __forceinline__ int at(int row, int n) const {
    return (row * groups + slot + n / kGroupPacks<T> * slots) * kGroupPacks<T> + n % kGroupPacks<T>;
  }
  __device__ __forceinline__ void load(const void* array, int row, uint4 (&packs)[kCount]) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      if (has(n)) packs[n] = ptx::load_input(static_cast<const uint4*>(array) + at(row, n));
    }
  }
};

// How many blocks a multiprocessor is to hold at least, where a thread has so many packs of a row.
constexpr int row_blocks(int packs, int world, bool once) { return packs == 1 && (!once || world <= 3) ? 2 : 1; }

// A row is a block's, or a cluster's, which takes one (kOnce) or several. A thread that has missed a peer goes on with
// NaN, so that the block stays together; its rows become NaN.
//
// One-shot: the whole message lies in the bank, as in one_shot.cuh. Two-shot: as in two_shot.cuh, the owner of a pack
// sums it and passes the sum on, and all its sums before it waits for others'. It keeps them in `normed`.
template <typename T, int kWorld, bool kTwoShot, int kGroups, bool kOnce>
__global__ void __launch_bounds__(kMaxThreads, row_blocks(RowPacks<T, kGroups>::kCount, kWorld, kOnce))
    all_reduce_layernorm_kernel(const __grid_constant__ LayerNormMessage m) {
  using Packs = RowPacks<T, kGroups>;
  constexpr int kCount = Packs::kCount;
  __shared__ RowSum::Room room;
  const GroupView& group = m.view.group;
  RowSum row_sum(room);
  const int groups = m.hidden / kGroup, num_packs = m.rows * groups * kGroupPacks<T>;
  const Packs packs{static_cast<int>(row_sum.slot()), static_cast<int>(row_sum.num_slots()), groups};
  const int first_row = blockIdx.x / row_sum.num_blocks(), row_step = gridDim.x / row_sum.num_blocks();
  const uint32_t stride = (kTwoShot ? m.shard_packs : num_packs) * kPackBytes, sums = (kWorld - 1) * stride;
  const uint32_t rank = ptx::in_register(group.rank);
  uint8_t* const banks = ptx::in_register(banks_of(m.view, group.rank));
  const Peers<kWorld> peers(m.view, stride);
  // Calls visit(row) for each row of this block, and next(row) before each but the first.
  const auto each_row = [&](auto&& visit, auto&& next) {
    for (int row = first_row;;) {
      visit(row);
      row += row_step;
      if (kOnce || row >= m.rows) break;
      next(row);
    }
  };
  const auto owner_of = [&](int i) { return kTwoShot ? shard_pack<kWorld>(i, m.shard_packs) : ShardPack{0, i}; };
  ptx::wait_for_previous_kernel(peers.ready() | reinterpret_cast<uint64_t>(banks) | rank);
  if (kOnce || !m.late) ptx::launch_next_kernel();

  uint4 own[kCount]{}, residual[kCount]{};
  packs.load(m.in, first_row, own);  // asked for before the epoch
  const Start start = read_start<false>(group);
  const uint64_t bank = bank_offset(m.view, start.bank());
  Trouble trouble = start.trouble();
  if (trouble == kFine) {
    uint4 pushed[kCount];
#pragma unroll
    for (int n = 0; n < kCount; ++n) pushed[n] = own[n];
    each_row(
        [&](int row) {
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
            if (!packs.has(n)) continue;
            const ShardPack p = owner_of(packs.at(row, n));
            const uint64_t offset = bank + p.j * kPackBytes;
            if (!kTwoShot) {
              peers.push(offset, without_sentinel(pushed[n]));
            } else if (p.owner != rank) {
              ptx::store_relaxed_sys(banks_of(m.view, p.owner) + (offset + place_of_sender(rank, p.owner) * stride),
                                     without_sentinel(pushed[n]));
            }
          }
        },
        [&](int row) { packs.load(m.in, row, pushed); });
  }
  const Entry entry = enter<false>(group, start, m.defer ? (kTwoShot ? 2 * sums / kPackBytes : sums / kPackBytes) : 0);
  packs.load(m.residual, first_row, residual);
  float weight[kGroups][kGroup], bias[kGroups][kGroup];
#pragma unroll
  for (int u = 0; u < kGroups; ++u) {
    if (!packs.has_group(u)) continue;
    load_weights<T, true>(m.weight, m.hidden, packs.slot + u * packs.slots, weight[u]);
    if (m.bias.data != nullptr) load_weights<T, true>(m.bias, m.hidden, packs.slot + u * packs.slots, bias[u]);
  }
  row_sum.begin();
  if (trouble == kFine) {
    empty_previous(m.view, start, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  }

  // Of a pack that is summed here: own -> sum.
  const auto sum_up = [&](const ShardPack& p, uint4& pack) {
    uint8_t* const places = banks + (bank + p.j * kPackBytes);
    uint4 sum;
    if (trouble == kFine) trouble = receive_and_sum<T, kWorld>(group, places, stride, pack, sum);
    if (!m.defer) empty_places<kWorld>(places, stride);
    pack = trouble == kFine ? sum : sentinel_pack();
    if (kTwoShot && trouble == kFine) {
      Peers<kWorld>(m.view, stride).push(bank + sums + p.j * kPackBytes, without_sentinel(sum));
    }
  };
  if constexpr (kTwoShot) {
    each_row(
        [&](int row) {
#pragma unroll
          for (int n = 0; n < kCount; ++n) {
            const int i = packs.at(row, n);
            const ShardPack p = owner_of(i);
            if (!packs.has(n) || p.owner != rank) continue;
            uint4 pack = row == first_row ? own[n] : ptx::load_input(static_cast<const uint4*>(m.in) + i);
            sum_up(p, pack);
            if (row == first_row) {
              own[n] = pack;
            } else {
              static_cast<uint4*>(m.normed)[i] = pack;
            }
          }
        },
        [](int) {});
  }
  each_row(
      [&](int row) {
        float v[kGroups][kGroup];
#pragma unroll
        for (int n = 0; n < kCount; ++n) {
          float lanes[T::kLanes]{};
          if (packs.has(n)) {
            const int i = packs.at(row, n);
            const ShardPack p = owner_of(i);
            if (!kTwoShot) {
              sum_up(p, own[n]);
            } else if (p.owner != rank) {
              uint8_t* const place = banks + (bank + sums + place_of_sender(p.owner, rank) * stride + p.j * kPackBytes);
              if (trouble == kFine) trouble = await_pack(group, place, p.owner, own[n]);
              if (!m.defer) *reinterpret_cast<uint4*>(place) = sentinel_pack();
              if (trouble != kFine) own[n] = sentinel_pack();
            } else if (row != first_row) {
              own[n] = ptx::load_input(static_cast<const uint4*>(m.normed) + i);
            }
            const uint4 terms[2] = {own[n], residual[n]};
            const uint4 sum = sum_in_order<T>(terms);
            static_cast<uint4*>(m.new_residual)[i] = sum;
            T::unpack(sum, lanes);
          }
#pragma unroll
          for (int k = 0; k < T::kLanes; ++k) v[n / kGroupPacks<T>][n % kGroupPacks<T> * T::kLanes + k] = lanes[k];
        }
        const auto total = [&](auto&& value) {
          float sum = value(v[0]);
#pragma unroll
          for (int u = 1; u < kGroups; ++u) {
            if (packs.has_group(u)) sum = add(sum, value(v[u]));
          }
          return row_sum.of(sum);
        };
        if (m.norm.layer) {
          const float mean = divide(total([](const float(&x)[kGroup]) { return sum_of_group(x); }), m.length);
#pragma unroll
          for (int u = 0; u < kGroups; ++u) subtract_mean(v[u], mean, packs.has_group(u) ? kGroup : 0);
        }
        const float squares = total([](const float(&x)[kGroup]) { return sum_of_squares(x); });
        const float factor = norm_factor(squares, m.length, m.norm.eps);
#pragma unroll
        for (int u = 0; u < kGroups; ++u) {
          if (!packs.has_group(u)) continue;
          scale(v[u], factor, weight[u], m.norm.weight_offset);
          if (m.bias.data != nullptr) {
#pragma unroll
            for (int k = 0; k < kGroup; ++k) v[u][k] = add(v[u][k], bias[u][k]);
          }
          store_group<T, true>(static_cast<uint4*>(m.normed) + row * groups * kGroupPacks<T>, m.hidden,
                               packs.slot + u * packs.slots, v[u]);
        }
      },
      [&](int row) {
        if (!kTwoShot) packs.load(m.in, row, own);
        packs.load(m.residual, row, residual);
      });
  if (!kOnce && m.late) ptx::launch_next_kernel();
  if (!leave(entry)) trouble = kOverlap;
  if (trouble != kFine) fail_group(group, kWorld, trouble, kAllReduceLayerNorm, start.epoch());
}

}  // namespace sgl_comm::device
