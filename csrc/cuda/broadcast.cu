// cfg_broadcast between GPUs: the source pushes its tensor to every peer, bit for bit.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cfg_calls.h"
#include "cuda/agreement.h"
#include "cuda/groups.h"
#include "cuda/launch.h"
#include "cuda/push_kernels.h"
#include "cuda/uncapturable.h"
#include "fallback.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

// As few threads a block as make one tile of the message, if any do; rows go one a warp.
Shape shape_for(const Residency& limits, int64_t rows) {
  unsigned threads = 64;
  while (threads < device::kBroadcastThreads && rows * 32 > int64_t{device::kMostBroadcastBlocks} * threads)
    threads *= 2;
  return limits.shape(Kind::kBroadcast, rows * 32, threads, device::kMostBroadcastBlocks);
}

// Row-major memory of `bytes`, the same number on every rank: `in` on the source; `out` where the result shall be.
void push_broadcast(const char* op, CommunicatorV2& comm, int64_t src, int64_t bytes, const void* in, void* out) {
  if (bytes == 0) return;
  const Unit unit = unit_for(in, out, bytes);
  constexpr int64_t kRowBytes = device::kRowData * device::kPackBytes;
  const int64_t rows = (bytes + kRowBytes - 1) / kRowBytes;
  const device::BroadcastMessage message{comm.view(),           in,          out, elements_of(unit, bytes), rows,
                                         static_cast<int>(src), comm.world()};
  launch_in_order(op, comm, broadcast_kernel(unit), shape_for(comm.limits(), rows), message);
}

Tensor received(const char* op, const GroupsV2::GroupPtr& group, const Tensor& input, int64_t src) {
  if (group->world == 1) return fresh_row_major(op, input);
  if (group->communicator == nullptr) {
    refuse_uncapturable(op, *group, input);
    return fallback::broadcast(op, input, src, group->name, group->rank);
  }
  CommunicatorV2& comm = *group->communicator;
  check_usable(op, comm, input);
  Tensor out = empty_row_major(op, input);
  const Tensor in = group->rank == src ? row_major(input) : Tensor();
  push_broadcast(op, comm, src, num_bytes(out), in.defined() ? in.const_data_ptr() : nullptr, out.mutable_data_ptr());
  return out;
}

void receive_in_place(const char* op, const GroupsV2::GroupPtr& group, Tensor& input, int64_t src) {
  if (group->world == 1) return;
  const bool source = group->rank == src;
  if (group->communicator == nullptr) {
    refuse_uncapturable(op, *group, input);
    const Tensor sent = fallback::broadcast(op, input, src, group->name, group->rank);
    if (!source) torch::stable::copy_(input, sent);
    return;
  }
  CommunicatorV2& comm = *group->communicator;
  check_usable(op, comm, input);
  if (source) {
    const Tensor in = row_major(input);
    return push_broadcast(op, comm, src, num_bytes(in), in.const_data_ptr(), nullptr);
  }
  overwrite(op, input,
            [&](Tensor& out) { push_broadcast(op, comm, src, num_bytes(out), nullptr, out.mutable_data_ptr()); });
}

Tensor cfg_broadcast(const Tensor& input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast";
  const auto group = groups_v2().find(kOp, group_name);
  return call_agreed(
      kOp, group, input, [&] { check_broadcast(kOp, input, src, group->world); },
      [&] { return describe_broadcast(input, src); }, [&] { return received(kOp, group, input, src); });
}

void cfg_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast_";
  const auto group = groups_v2().find(kOp, group_name);
  const auto checks = [&] {
    check_broadcast(kOp, input, src, group->world);
    check_disjoint(kOp, input);
  };
  call_agreed(
      kOp, group, input, checks, [&] { return describe_broadcast(input, src); },
      [&] { receive_in_place(kOp, group, input, src); });
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast));
  m.impl("cfg_broadcast_", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast_));
}

// To be refused like others that the group cannot take, and counted.
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, SparseCUDA, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast));
  m.impl("cfg_broadcast_", TORCH_BOX(&sgl_comm::cuda::cfg_broadcast_));
}
