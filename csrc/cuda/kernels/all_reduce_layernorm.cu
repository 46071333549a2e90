// Holds the fused all-reduce, residual and norm kernels: the push protocol's sums, one- or two-shot, and norm.cuh's
// rows in one launch.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/norm.cuh"
#include "cuda/device/partition.cuh"
#include "cuda/device/push.cuh"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::device {

// The push protocol by packs, each with an owner that sums it. One-shot: every rank owns all packs, and slots are laid
// out as in one_shot.cu. Two-shot: each rank owns a shard and pushes its sums to the others, as in two_shot.cu.
template <typename T, int kWorld, bool kTwoShot>
class PackSums {
 public:
  // packs: of the message or, in two-shot, of a shard.
  __device__ __forceinline__ PackSums(const PushView& view, uint32_t packs, bool defer)
      : view_(view),
        packs_(packs),
        defer_(defer),
        rank_(ptx::in_register(view.group.rank)),
        buffers_(ptx::in_register(buffers_of(view, view.group.rank))),
        peers_(view, packs * kPackBytes) {}
  __device__ __forceinline__ uint64_t ready() const {
    return peers_.ready() | reinterpret_cast<uint64_t>(buffers_) | rank_;
  }
  __device__ __forceinline__ void begin(const Start& start) {
    buffer_ = buffer_offset(view_, start.buffer());
    status_ = start.status();
  }

  // How many packs of the buffer the launch leaves full, if it defers the emptying.
  __device__ __forceinline__ uint32_t left_full() const {
    // Written out for known worlds, here and in sums(): the compiler makes other instructions of a variable.
    if constexpr (kWorld != kSharedWorld) {
      return defer_ ? (kTwoShot ? 2 : 1) * (kWorld - 1) * packs_ : 0;
    } else {
      return defer_ ? (kTwoShot ? 2 : 1) * (world_of<kWorld>(view_.group) - 1) * packs_ : 0;
    }
  }
  __device__ __forceinline__ bool owns(int i) const { return !kTwoShot || of(i).owner == rank_; }
  __device__ __forceinline__ Status status() const { return status_; }

  __device__ __forceinline__ void push(int i, uint4 pack) const {
    const ShardPack p = of(i);
    const uint64_t offset = buffer_ + p.j * kPackBytes;
    if (!kTwoShot) {
      peers_.push(offset, without_sentinel(pack));
    } else if (p.owner != rank_) {
      ptx::store_relaxed_sys(buffers_of(view_, p.owner) + (offset + sender_index(rank_, p.owner) * stride()),
                             without_sentinel(pack));
    }
  }

  // For a pack that this rank owns: turns this rank's part into the sum, or into NaN if the launch has failed.
  __device__ __forceinline__ void sum_up(int i, uint4& pack) {
    const uint64_t offset = buffer_ + of(i).j * kPackBytes;
    uint8_t* const slots = buffers_ + offset;
    uint4 sum = sentinel_pack();
    if (status_ == kOk) {
      status_ = receive_and_sum<T, kWorld>(view_.group, slots, stride(), pack, sum);
      if (!defer_) empty_slots<kWorld>(view_.group, slots, stride());
      if (kTwoShot && status_ == kOk) Peers<kWorld>(view_, stride()).push(sums() + offset, without_sentinel(sum));
    }
    pack = status_ == kOk ? sum : sentinel_pack();
  }

  // For a pack that another rank owns: gives its sum, or NaN if the launch has failed.
  __device__ __forceinline__ void receive(int i, uint4& pack) {
    const ShardPack p = of(i);
    uint8_t* const slot = buffers_ + (buffer_ + sums() + sender_index(p.owner, rank_) * stride() + p.j * kPackBytes);
    if (status_ == kOk) {
      status_ = await_pack(view_.group, slot, p.owner, pack);
      if (!defer_) *reinterpret_cast<uint4*>(slot) = sentinel_pack();
    }
    if (status_ != kOk) pack = sentinel_pack();
  }

 private:
  __device__ __forceinline__ ShardPack of(int i) const {
    return kTwoShot ? shard_pack<kWorld>(i, packs_) : ShardPack{0, i};
  }
  __device__ __forceinline__ uint32_t stride() const { return packs_ * kPackBytes; }
  __device__ __forceinline__ uint32_t sums() const {
    if constexpr (kWorld != kSharedWorld) {
      return (kWorld - 1) * stride();
    } else {
      return (world_of<kWorld>(view_.group) - 1) * stride();
    }
  }

  const PushView& view_;
  const uint32_t packs_;
  const bool defer_;
  const int rank_;
  uint8_t* const buffers_;
  const Peers<kWorld> peers_;
  uint64_t buffer_ = 0;
  Status status_ = kOk;
};

// A block, or a cluster of blocks, takes one row (kOnce) or several. A thread has at most kVectors vectors of a row, in
// kPartials partial sums. A thread that has missed a peer goes on with NaN, so that the block stays together; its rows
// become NaN.
template <typename T, int kWorld, bool kTwoShot, int kVectors, int kPartials, bool kOnce>
__global__ void __launch_bounds__(kMaxThreads, row_blocks(RowPacks<T, kVectors>::kCount, kWorld, kOnce))
    all_reduce_layernorm_kernel(const __grid_constant__ AllReduceLayerNormParameters params) {
  using Packs = RowPacks<T, kVectors>;
  __shared__ RowSumShared shared;
  __shared__ LeaveState leave_state;
  const GroupView& group = params.view.group;
  RowSum<kPartials> row_sum(shared);
  const Packs packs(row_sum, params.hidden);
  const int first_row = ptx::cluster_index(), row_step = ptx::num_clusters();
  PackSums<T, kWorld, kTwoShot> sums(params.view, kTwoShot ? params.shard_packs : params.rows * packs.of_row(),
                                     params.defer);
  // Calls visit(row) for each row of this block, and next(row) before each but the first.
  const auto each_row = [&](auto&& visit, auto&& next) {
    for (int row = first_row;;) {
      visit(row);
      row += row_step;
      if (kOnce || row >= params.rows) break;
      next(row);
    }
  };
  const uint4* const in = ptx::in_register(packs.first(params.in, first_row));
  ptx::wait_for_previous_kernel(sums.ready() | reinterpret_cast<uint64_t>(in));
  if (!params.late) ptx::launch_next_kernel();

  typename Packs::Array own{}, residual{};
  packs.load(in, own);  // asked for before the epoch
  const Start start = read_start<false>(group);
  sums.begin(start);
  if (start.status() == kOk) {
    typename Packs::Array pushed;
    packs.copy(own, pushed);
    each_row([&](int row) { packs.each(row, [&](int n, int i) { sums.push(i, pushed[n]); }); },
             [&](int row) { packs.load(params.in, row, pushed); });
  }
  packs.load(params.residual, first_row, residual);
  constexpr bool kBiasLate = kPartials > 1;  // asked for when it is needed, since registers are short
  const RowWeights<T, kVectors> weights(packs, params.weight), early_bias(packs, kBiasLate ? Weights{} : params.bias);
  const auto biases = [&] { return kBiasLate ? RowWeights<T, kVectors>(packs, params.bias) : early_bias; };
  const Entry entry = enter<false>(group, start, sums.left_full());
  if (threadIdx.x == 0) leave_state = entry.leave_state;  // registers are short
  row_sum.begin();
  if (start.status() == kOk) {
    empty_previous(params.view, start, blockIdx.x * blockDim.x + threadIdx.x, gridDim.x * blockDim.x);
  }

  if constexpr (kTwoShot) {  // all sums before any wait for another's; those of later rows wait in `normed`
    each_row(
        [&](int row) {
          packs.each(row, [&](int n, int i) {
            if (!sums.owns(i)) return;
            uint4 pack = row == first_row ? own[n] : ptx::load_input(static_cast<const uint4*>(params.in) + i);
            sums.sum_up(i, pack);
            (row == first_row ? own[n] : static_cast<uint4*>(params.normed)[i]) = pack;
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
            own[n] = ptx::load_input(static_cast<const uint4*>(params.normed) + i);
          }
          const uint4 terms[2] = {own[n], residual[n]};
          static_cast<uint4*>(params.new_residual)[i] = own[n] = sum_in_order<T>(terms, [](int) { return true; });
        });
        float v[kVectors][kVector]{};
        packs.each(row, [&](int n, int) { packs.widen(own[n], n, v); });
        normalise<T>(v, packs, weights, biases, params.norm, params.length, row_sum);
        packs.store(params.normed, row, v);
      },
      [&](int row) {
        if (!kTwoShot) packs.load(params.in, row, own);
        packs.load(params.residual, row, residual);
      });
  if (params.late) ptx::launch_next_kernel();
  const Status status = leave({entry.before, leave_state}) ? sums.status() : kOverlap;
  if (status == kOk) return;
  each_row(
      [&](int row) {
        packs.each(row, [&](int, int i) {
          static_cast<uint4*>(params.normed)[i] = static_cast<uint4*>(params.new_residual)[i] = sentinel_pack();
        });
      },
      [](int) {});
  fail_group(group, world_of<kWorld>(group), status, Op::kAllReduceLayerNorm, start.epoch());
}

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

LayerNormKernel all_reduce_layernorm_kernel(DType dtype, int world, FusedRows rows, int vectors) {
  return visit_dtype(dtype, [&](auto d) {
    using T = DeviceType<d.value>;
    if (vectors != 1 && rows != FusedRows::kOne) {  // rows too wide for one vector a partial sum
      return visit_kernel_world<device::kFewestShared>(world, [&](auto n) -> LayerNormKernel {
        return rows == FusedRows::kMany ? device::all_reduce_layernorm_kernel<T, n.value, false, kMostVectors, 1, false>
                                        : device::all_reduce_layernorm_kernel<T, n.value, true, kMostVectors, 1, false>;
      });
    }
    return visit_kernel_world(world, [&](auto n) -> LayerNormKernel {
      constexpr int kWorld = n.value;
      switch (rows) {
        case FusedRows::kOne:
          return vectors == 1 ? device::all_reduce_layernorm_kernel<T, kWorld, false, 1, 1, true>
                              : device::all_reduce_layernorm_kernel<T, kWorld, false, kMostVectors, kMostVectors, true>;
        case FusedRows::kMany:
          return device::all_reduce_layernorm_kernel<T, kWorld, false, 1, 1, false>;
        case FusedRows::kManyTwoShot:
          return device::all_reduce_layernorm_kernel<T, kWorld, true, 1, 1, false>;
      }
      fail("sgl_comm: no fused kernel for rows of kind ", static_cast<int>(rows));
    });
  });
}

}  // namespace sgl_comm::cuda
