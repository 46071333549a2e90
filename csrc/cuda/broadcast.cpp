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

// What a rank brings: `in` on the source, `out` where the result shall be; else undefined.
struct Ends {
  Tensor in, out;

  const Tensor& either() const { return in.defined() ? in : out; }
  const void* from() const { return in.defined() ? in.const_data_ptr() : nullptr; }
  void* to() const { return out.defined() ? out.mutable_data_ptr() : nullptr; }
  bool row_major() const { return (!in.defined() || is_row_major(in)) && (!out.defined() || is_row_major(out)); }
};

struct Call {
  const char* op;
  CommunicatorV2& comm;
  int64_t src;

  // Row-major ends.
  void push(const Ends& ends) const {
    const int64_t bytes = num_bytes(ends.either());
    if (bytes == 0) return;
    const Unit unit = unit_for(ends.from(), ends.to(), bytes);
    launch(broadcast_kernel(unit), message_for(ends, elements_of(unit, bytes)));
  }

  // Ends of any strides. False, and nothing done, where row-major copies are better, or these are.
  bool push_strided(const Ends& ends) const {
    const Tensor& either = ends.either();
    if (ends.row_major() || num_bytes(either) == 0) return false;
    const int64_t unit_bytes = strided_unit_for(ends.from(), ends.to(), either.element_size());
    const auto strides = [&](const Tensor& end) { return end.defined() ? strides_of(end, unit_bytes) : Strides{}; };
    const auto from = strides(ends.in), to = strides(ends.out);
    if (!from || !to) return false;
    launch(strided_broadcast_kernel(unit_bytes), device::WithStrides<device::BroadcastMessage>{
                                                     message_for(ends, num_bytes(either) / unit_bytes), *from, *to});
    return true;
  }

 private:
  device::BroadcastMessage message_for(const Ends& ends, int64_t count) const {
    constexpr int64_t kRowBytes = device::kRowData * device::kPackBytes;
    const int64_t rows = (num_bytes(ends.either()) + kRowBytes - 1) / kRowBytes;
    return {comm.view(), ends.from(), ends.to(), count, rows, static_cast<int>(src), comm.world()};
  }

  template <typename Message>
  void launch(void (*kernel)(Message), const Message& message) const {
    launch_in_order(op, comm, kernel, shape_for(comm.limits(), message.num_rows), message);
  }
};

Tensor received(const char* op, const GroupsV2::GroupPtr& group, const Tensor& input, int64_t src) {
  if (group->world == 1) return fresh_row_major(op, input);
  if (group->communicator == nullptr) {
    refuse_uncapturable(op, *group, input);
    return fallback::broadcast(op, input, src, group->name, group->rank);
  }
  check_usable(op, *group->communicator, input);
  const Call call{op, *group->communicator, src};
  Ends ends{group->rank == src ? input : Tensor(), empty_row_major(op, input)};
  if (!call.push_strided(ends)) {
    if (group->rank == src) ends.in = row_major(input);
    call.push(ends);
  }
  return ends.out;
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
  check_usable(op, *group->communicator, input);
  const Call call{op, *group->communicator, src};
  if (call.push_strided(source ? Ends{input, Tensor()} : Ends{Tensor(), input})) return;
  if (source) return call.push({row_major(input), Tensor()});
  overwrite(op, input, [&](Tensor& out) { call.push({Tensor(), out}); });
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
