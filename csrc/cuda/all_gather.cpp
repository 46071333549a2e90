// all_gather between GPUs: every rank pushes its tensor to every peer, bit for bit.
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

constexpr const char* kOp = "all_gather";

void push_all_gather(PushCommunicator& comm, const Tensor& in, Tensor& out) {
  check_usable(kOp, comm, in);
  const int64_t bytes = num_bytes(in);
  if (bytes == 0) return;
  device::PushParameters parameters{};
  parameters.view = comm.view();
  parameters.in = in.const_data_ptr();
  parameters.out = out.mutable_data_ptr();
  const Unit unit = unit_for(parameters.in, parameters.out, bytes);
  parameters.shard_count = elements_of(unit, bytes);
  parameters.count = parameters.shard_count * comm.world();
  parameters.num_packs = packs_of(bytes);
  parameters.op = Op::kAllGather;
  parameters.defer = true;

  constexpr int64_t kRowBytes = device::kRowPacks * device::kPackBytes;
  const int64_t rows = (parameters.num_packs + device::kRowData - 1) / device::kRowData;
  const bool ring = rows * kRowBytes > comm.sender_bytes() ||
                    rows * device::kRowPacks * (comm.world() - 1) > device::BufferState::kMostPacks;
  constexpr int64_t kRingBlockBytes = device::kRingSlots * kRowBytes * (device::kMaxThreads / device::kRowData);
  const Residency& limits = comm.limits();
  const int64_t threads = rows * device::kRowData;
  const Shape shape =
      ring ? limits.shape(KernelKind::kRing, threads, device::kMaxThreads, comm.most_ring_blocks(kRingBlockBytes))
           : limits.shape(KernelKind::kGather, threads, threads <= 64 ? 64 : 128);
  launch_in_order(kOp, comm, gather_kernel(unit, comm.world(), ring), shape, parameters);
}

Tensor all_gather(const Tensor& input, const Text& group_name) {
  check_input(kOp, input);
  const auto group = groups().find(kOp, group_name);
  const auto sizes = gathered_sizes(kOp, input, group->world);
  if (group->world == 1) return fresh_row_major(kOp, input);
  PushCommunicator* const comm = group->push.serving();
  if (comm == nullptr) {
    refuse_uncapturable(kOp, *group, input);
    return fallback::all_gather(kOp, input, group_name, group->world);
  }
  Tensor out = empty_row_major(kOp, input, sizes.data());
  push_all_gather(*comm, row_major(input), out);
  return out;
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) { m.impl("all_gather", TORCH_BOX(&sgl_comm::cuda::all_gather)); }
