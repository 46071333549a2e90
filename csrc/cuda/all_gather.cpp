// all_gather between GPUs: every rank pushes its tensor to every peer, bit for bit.
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

constexpr const char* kOp = "all_gather";

void push_all_gather(CommunicatorV2& comm, const Tensor& in, Tensor& out) {
  check_usable(kOp, comm, in);
  const int64_t bytes = num_bytes(in);
  if (bytes == 0) return;
  device::Message message{comm.view(), in.const_data_ptr(), out.mutable_data_ptr(), 0,
                          0,           packs_of(bytes),     device::kAllGather,     true};
  const Unit unit = unit_for(message.in, message.out, bytes);
  message.shard_count = elements_of(unit, bytes);
  message.count = message.shard_count * comm.world();

  constexpr int64_t kRowBytes = device::kRowPacks * device::kPackBytes;
  const int64_t rows = (message.num_packs + device::kRowData - 1) / device::kRowData;
  const bool ring =
      rows * kRowBytes > comm.slot_bytes() || rows * device::kRowPacks * (comm.world() - 1) > device::Baton::kMostPacks;
  constexpr int64_t kRingBlockBytes = device::kRingPlaces * kRowBytes * (device::kMaxThreads / device::kRowData);
  const Residency& limits = comm.limits();
  const int64_t threads = rows * device::kRowData;
  const Shape shape =
      ring ? limits.shape(Kind::kRing, threads, device::kMaxThreads, comm.most_ring_blocks(kRingBlockBytes))
           : limits.shape(Kind::kGather, threads, threads <= 64 ? 64 : 128);
  launch_in_order(kOp, comm, gather_kernel(unit, comm.world(), ring), shape, message);
}

Tensor all_gather(const Tensor& input, const Text& group_name) {
  check_input(kOp, input);
  const auto group = groups_v2().find(kOp, group_name);
  const auto sizes = gathered_sizes(kOp, input, group->world);
  if (group->world == 1) return fresh_row_major(kOp, input);
  if (group->communicator == nullptr) {
    refuse_uncapturable(kOp, *group, input);
    return fallback::all_gather(kOp, input, group_name, group->world);
  }
  Tensor out = empty_row_major(kOp, input, sizes.data());
  push_all_gather(*group->communicator, row_major(input), out);
  return out;
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) { m.impl("all_gather", TORCH_BOX(&sgl_comm::cuda::all_gather)); }
