// reduce_scatter between GPUs: the first half of the two-shot all-reduce, with one shard a rank of dimension 0.
#include <torch/csrc/stable/library.h>

#include "cuda/groups.h"
#include "cuda/launch.h"
#include "cuda/push_kernels.h"
#include "cuda/uncapturable.h"
#include "fallback.h"
#include "policy.h"
#include "rows.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

constexpr const char* kOp = "reduce_scatter";

// The ring's bank holds the shards alone: half as much a block as an all-reduce's.
constexpr int64_t kRingBlockBytes = device::kRingPlaces * device::kPackBytes * device::kMaxThreads;

void push_reduce_scatter(CommunicatorV2& comm, const Tensor& in, Tensor& out) {
  check_usable(kOp, comm, in);
  if (in.numel() == 0) return;
  const DType dtype = dtype_of(in.scalar_type());
  const int64_t shard_count = out.numel(), shard_bytes = shard_count * size_of(dtype);
  const device::Message message{
      comm.view(), in.const_data_ptr(),   out.mutable_data_ptr(), in.numel(),
      shard_count, packs_of(shard_bytes), device::kReduceScatter, push_defers(in.numel() * size_of(dtype))};
  const bool whole = aligned(message.in, device::kPackBytes) && aligned(message.out, device::kPackBytes) &&
                     shard_bytes % device::kPackBytes == 0;
  const bool ring = message.num_packs * device::kPackBytes > comm.slot_bytes();
  const Residency& limits = comm.limits();
  const int64_t threads = message.num_packs * comm.world();
  const Shape shape =
      ring ? limits.shape(Kind::kRing, message.num_packs, device::kMaxThreads, comm.most_ring_blocks(kRingBlockBytes))
           : limits.shape(Kind::kTwoShot, threads, two_shot_threads(threads));
  launch_in_order(kOp, comm, reduce_scatter_kernel(dtype, comm.world(), whole, ring), shape, message);
}

Tensor reduce_scatter(const Tensor& input, const Text& group_name) {
  check_input(kOp, input);
  const auto group = groups_v2().find(kOp, group_name);
  const auto sizes = scattered_sizes(kOp, input, group->world);
  if (group->world == 1) return fresh_row_major(kOp, input);
  if (group->communicator == nullptr || dtype_of(input.scalar_type()) == DType::kOther) {
    refuse_uncapturable(kOp, *group, input);
    return fallback::reduce_scatter(kOp, input, group_name, group->world);
  }
  Tensor out = empty_row_major(kOp, input, sizes.data());
  push_reduce_scatter(*group->communicator, row_major(input), out);
  return out;
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) { m.impl("reduce_scatter", TORCH_BOX(&sgl_comm::cuda::reduce_scatter)); }
