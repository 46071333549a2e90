// Fused all-reduce, residual and norm: the push protocol's sums, one- or two-shot, and norm.cuh's rows in one launch.
#pragma once

#include "cuda/device/message.cuh"
#include "cuda/device/norm.cuh"
#include "cuda/device/two_shot.cuh"

namespace sgl_comm::device {

// The push protocol by packs, of which each has an owner that sums it. One-shot: every rank owns all, and the whole
// message lies in the bank, as in one_shot.cuh. Two-shot: each owns a shard and passes its sums on, as in two_shot.cuh.
template <typename T, int kWorld, bool kTwoShot>
class PackSums {
 public:
  // packs: of the message; two-shot: of a shard.
  __device__ __forceinline__ PackSums(const PushView& view, uint32_t packs, bool defer)
      : view_(view),
        packs_(packs),
        defer_(defer),
        rank_(ptx::in_register(view.group.rank)),
        banks_(ptx::in_register(banks_of(view, view.group.rank))),
        peers_(view, packs * kPackBytes) {}
  __device__ __forceinline__ uint64_t ready() const {
    return peers_.ready() | reinterpret_cast<uint64_t>(banks_) | rank_;
  }
  __device__ __forceinline__ void begin(const Start& start) {
    bank_ = bank_offset(view_, start.bank());
    trouble_ = start.trouble();
  }

  // What a launch leaves full if it defers the emptying.
  __device__ __forceinline__ uint32_t left_full() const {
    // Written out for known worlds, here and in sums(): the compiler makes other instructions of a variable.
    if constexpr (kWorld != kShared) {
      return defer_ ? (kTwoShot ? 2 : 1) * (kWorld - 1) * packs_ : 0;
    } else {
      return defer_ ? (kTwoShot ? 2 : 1) * (world_of<kWorld>(view_.group) - 1) * packs_ : 0;
    }
  }
  __device__ __forceinline__ bool owns(int i) const { return !kTwoShot || of(i).owner == rank_; }
  __device__ __forceinline__ Trouble trouble() const { return trouble_; }

  __device__ __forceinline__ void push(int i, uint4 pack) const {
    const ShardPack p = of(i);
    const uint64_t offset = bank_ + p.j * kPackBytes;
    if (!kTwoShot) {
      peers_.push(offset, without_sentinel(pack));
    } else if (p.owner != rank_) {
      ptx::store_relaxed_sys(banks_of(view_, p.owner) + (offset + place_of_sender(rank_, p.owner) * stride()),
                             without_sentinel(pack));
    }
  }

  // Of a pack that this rank owns: from its own part to the sum, or NaN in trouble.
  __device__ __forceinline__ void sum_up(int i, uint4& pack) {
    const uint64_t offset = bank_ + of(i).j * kPackBytes;
    uint8_t* const places = banks_ + offset;
    uint4 sum = sentinel_pack();
    if (trouble_ == kFine) {
      trouble_ = receive_and_sum<T, kWorld>(view_.group, places, stride(), pack, sum);
      if (!defer_) empty_places<kWorld>(view_.group, places, stride());
      if (kTwoShot && trouble_ == kFine) Peers<kWorld>(view_, stride()).push(sums() + offset, without_sentinel(sum));
    }
    pack = trouble_ == kFine ? sum : sentinel_pack();
  }

  // The sum of a pack that another rank owns, or NaN.
  __device__ __forceinline__ void receive(int i, uint4& pack) {
    const ShardPack p = of(i);
    uint8_t* const place = banks_ + (bank_ + sums() + place_of_sender(p.owner, rank_) * stride() + p.j * kPackBytes);
    if (trouble_ == kFine) {
      trouble_ = await_pack(view_.group, place, p.owner, pack);
      if (!defer_) *reinterpret_cast<uint4*>(place) = sentinel_pack();
    }
    if (trouble_ != kFine) pack = sentinel_pack();
  }

 private:
  __device__ __forceinline__ ShardPack of(int i) const {
    return kTwoShot ? shard_pack<kWorld>(i, packs_) : ShardPack{0, i};
  }
  __device__ __forceinline__ uint32_t stride() const { return packs_ * kPackBytes; }
  __device__ __forceinline__ uint32_t sums() const {
    if constexpr (kWorld != kShared) {
      return (kWorld - 1) * stride();
    } else {
      return (world_of<kWorld>(view_.group) - 1) * stride();
    }
  }

  const PushView& view_;
  const uint32_t packs_;
  const bool defer_;
  const int rank_;
  uint8_t* const banks_;
  const Peers<kWorld> peers_;
  uint64_t bank_ = 0;
  Trouble trouble_ = kFine;
};

// A row is a block's, or a cluster's, which takes one (kOnce) or several. A thread has kGroups groups of it at most, in
// kSlots slots. A thread that has missed a peer goes on with NaN, so that the block stays together; its rows become
// NaN.
template <typename T, int kWorld, bool kTwoShot, int kGroups, int kSlots, bool kOnce>
__global__ void __launch_bounds__(kMaxThreads, row_blocks(RowPacks<T, kGroups>::kCount, kWorld, kOnce))
    all_reduce_layernorm_kernel(const __grid_constant__ LayerNormMessage m) {
  using Packs = RowPacks<T, kGroups>;
  __shared__ RowSumRoom room;
  __shared__ Ending ending;
  const GroupView& group = m.view.group;
  RowSum<kSlots> row_sum(room);
  const Packs packs(row_sum, m.hidden);
  const int first_row = ptx::cluster_index(), row_step = ptx::num_clusters();
  PackSums<T, kWorld, kTwoShot> sums(m.view, kTwoShot ? m.shard_packs : m.rows * packs.of_row(), m.defer);
  // Calls visit(row) for each row of this block, and next(row) before each but the first.
  const auto each_row = [&](auto&& visit, auto&& next) {
    for (int row = first_row;;) {
      visit(row);
      row += row_step;
      if (kOnce || row >= m.rows) break;
      next(row);
    }
  };
  const uint4* const in = ptx::in_register(packs.first(m.in, first_row));
  ptx::wait_for_previous_kernel(sums.ready() | reinterpret_cast<uint64_t>(in));
  if (!m.late) ptx::launch_next_kernel();

  typename Packs::Array own{}, residual{};
  packs.load(in, own);  // asked for before the epoch
  const Start start = read_start<false>(group);
  sums.begin(start);
  if (start.trouble() == kFine) {
    typename Packs::Array pushed;
    packs.copy(own, pushed);
    each_row([&](int row) { packs.each(row, [&](int n, int i) { sums.push(i, pushed[n]); }); },
             [&](int row) { packs.load(m.in, row, pushed); });
  }
  packs.load(m.residual, first_row, residual);
  constexpr bool kBiasLate = kSlots > 1;  // asked for when it is needed, since registers are short
  const RowWeights<T, kGroups> weights(packs, m.weight), early_bias(packs, kBiasLate ? Weights{} : m.bias);
  const auto biases = [&] { return kBiasLate ? RowWeights<T, kGroups>(packs, m.bias) : early_bias; };
  const Entry entry = enter<false>(group, start, sums.left_full());
  if (threadIdx.x == 0) ending = entry.ending;  // registers are short
  row_sum.begin();
  if (start.trouble() == kFine) {
    empty_previous(m.view, start, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  }

  if constexpr (kTwoShot) {  // all sums before any wait for another's; those of later rows wait in `normed`
    each_row(
        [&](int row) {
          packs.each(row, [&](int n, int i) {
            if (!sums.owns(i)) return;
            uint4 pack = row == first_row ? own[n] : ptx::load_input(static_cast<const uint4*>(m.in) + i);
            sums.sum_up(i, pack);
            (row == first_row ? own[n] : static_cast<uint4*>(m.normed)[i]) = pack;
          });
        },
        [](int) {});
  }
  each_row(
      [&](int row) {
        packs.each(row, [&](int n, int i) {
          if (!kTwoShot) {
            sums.sum_up(i, own[n]);
          } else if (!sums.owns(i)) {
            sums.receive(i, own[n]);
          } else if (row != first_row) {
            own[n] = ptx::load_input(static_cast<const uint4*>(m.normed) + i);
          }
          const uint4 terms[2] = {own[n], residual[n]};
          static_cast<uint4*>(m.new_residual)[i] = own[n] = sum_in_order<T>(terms, [](int) { return true; });
        });
        float v[kGroups][kGroup]{};
        packs.each(row, [&](int n, int) { packs.widen(own[n], n, v); });
        normalise<T>(v, packs, weights, biases, m.norm, m.length, row_sum);
        packs.store(m.normed, row, v);
      },
      [&](int row) {
        if (!kTwoShot) packs.load(m.in, row, own);
        packs.load(m.residual, row, residual);
      });
  if (m.late) ptx::launch_next_kernel();
  const Trouble trouble = leave({entry.before, ending}) ? sums.trouble() : kOverlap;
  if (trouble == kFine) return;
  each_row(
      [&](int row) {
        packs.each(row, [&](int, int i) {
          static_cast<uint4*>(m.normed)[i] = static_cast<uint4*>(m.new_residual)[i] = sentinel_pack();
        });
      },
      [](int) {});
  fail_group(group, world_of<kWorld>(group), trouble, kAllReduceLayerNorm, start.epoch());
}

}  // namespace sgl_comm::device
