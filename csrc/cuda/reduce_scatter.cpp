// reduce_scatter between GPUs: the first half of the two-shot all-reduce, with one shard a rank of dimension 0.
#include <torch/csrc/stable/library.h>

#include "cuda/capture_check.h"
#include "cuda/group/groups.h"
#include "cuda/kernels/push_kernels.h"
#include "cuda/launch.h"
#include "fallback.h"
#include "policy.h"
#include "rows.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

constexpr const char* kOp = "reduce_scatter";

// How many bytes of one sender's part of a buffer a block of the ring needs: half as many as an all-reduce's, since
// there are no sums in it.
constexpr int64_t kRingBlockBytes = device::kRingSlots * device::kPackBytes * device::kMaxThreads;

void push_reduce_scatter(PushCommunicator& comm, const Tensor& in, Tensor& out) {
  check_usable(kOp, comm, in);
  if (in.numel() == 0) return;
  const DType dtype = dtype_of(in.scalar_type());
  const int64_t shard_count = out.numel(), shard_bytes = shard_count * size_of(dtype);
  device::PushParameters parameters{};
  parameters.view = comm.view();
  parameters.in = in.const_data_ptr();
  parameters.out = out.mutable_data_ptr();
  parameters.count = in.numel();
  parameters.shard_count = shard_count;
  parameters.num_packs = packs_of(shard_bytes);
  parameters.op = Op::kReduceScatter;
  parameters.defer = push_defers(in.numel() * size_of(dtype));
  const bool aligned = is_aligned(parameters.in, device::kPackBytes) &&
                       is_aligned(parameters.out, device::kPackBytes) && shard_bytes % device::kPackBytes == 0;
  const bool ring = parameters.num_packs * device::kPackBytes > comm.sender_bytes();
  const Residency& limits = comm.limits();
  const int64_t threads = parameters.num_packs * comm.world();
  const Shape shape = ring ? limits.shape(KernelKind::kRing, parameters.num_packs, device::kMaxThreads,
                                          comm.most_ring_blocks(kRingBlockBytes))
                           : limits.shape(KernelKind::kTwoShot, threads, two_shot_threads(threads));
  launch_in_order(kOp, comm, reduce_scatter_kernel(dtype, comm.world(), aligned, ring), shape, parameters);
}

Tensor reduce_scatter(const Tensor& input, const Text& group_name) {
  check_input(kOp, input);
  const auto group = groups().find(kOp, group_name);
  const auto sizes = scattered_sizes(kOp, input, group->world);
  if (group->world == 1) return fresh_row_major(kOp, input);
  PushCommunicator* const comm = group->push.serving();
  if (comm == nullptr || dtype_of(input.scalar_type()) == DType::kOther) {
    refuse_uncapturable(kOp, *group, input);
    return fallback::reduce_scatter(kOp, input, group_name, group->world);
  }
  Tensor out = empty_row_major(kOp, input, sizes.data());
  push_reduce_scatter(*comm, row_major(input), out);
  return out;
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) { m.impl("reduce_scatter", TORCH_BOX(&sgl_comm::cuda::reduce_scatter)); }
