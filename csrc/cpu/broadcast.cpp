// cfg_broadcast between the processes of one host, through shared memory.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cfg_calls.h"
#include "cpu/agreement.h"
#include "fallback.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

// The source's bytes pass through its slot, a chunk a step: copied once in and, by each peer, once out. The source goes
// on at once, two chunks ahead of its peers at most. There is one step at least, so that an empty call, too, must be
// the same on all ranks. `buffer` is row-major: read on the source, written on the others.
void broadcast(const char* op, ShmCommunicator& comm, int64_t src, Tensor& buffer) {
  const auto count = static_cast<size_t>(buffer.numel()), bytes = count * buffer.element_size();
  const bool source = comm.rank() == src;
  const std::byte* const in = source ? static_cast<const std::byte*>(buffer.const_data_ptr()) : nullptr;
  std::byte* const out = source ? nullptr : static_cast<std::byte*>(buffer.mutable_data_ptr());
  const auto turn = comm.begin(op, {Call::Kind::kBroadcast, buffer.scalar_type(), count, static_cast<uint8_t>(src)});
  size_t first = 0;
  do {
    const size_t length = std::min(ShmCommunicator::kSlotBytes, bytes - first);
    comm.next_step();
    std::byte* const slot = comm.slot(static_cast<int>(src));
    if (source) std::memcpy(slot, in + first, length);
    comm.arrive();
    if (!source) {
      comm.await_arrival(static_cast<int>(src));
      std::memcpy(out + first, slot, length);
    }
    comm.await_later();
    first += length;
  } while (first < bytes);
}

Tensor cfg_broadcast(const Tensor& input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast";
  const auto group = groups().find(kOp, group_name);
  agree_on_call(
      kOp, group, [&] { check_broadcast(kOp, input, src, group->world); },
      [&] { return describe_broadcast(input, src); });
  if (group->world == 1) return fresh_row_major(kOp, input);
  if (group->communicator == nullptr) return fallback::broadcast(kOp, input, src, group->name, group->rank);
  Tensor out = group->rank == src ? fresh_row_major(kOp, input) : empty_row_major(kOp, input);
  broadcast(kOp, *group->communicator, src, out);
  return out;
}

void cfg_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast_";
  const auto group = groups().find(kOp, group_name);
  const auto checks = [&] {
    check_broadcast(kOp, input, src, group->world);
    check_disjoint(kOp, input);
  };
  agree_on_call(kOp, group, checks, [&] { return describe_broadcast(input, src); });
  if (group->world == 1) return;
  const bool source = group->rank == src;
  if (group->communicator == nullptr) {
    const Tensor sent = fallback::broadcast(kOp, input, src, group->name, group->rank);
    if (!source) torch::stable::copy_(input, sent);
    return;
  }
  if (source) {
    Tensor in = row_major(input);
    return broadcast(kOp, *group->communicator, src, in);
  }
  overwrite(kOp, input, [&](Tensor& out) { broadcast(kOp, *group->communicator, src, out); });
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cpu::cfg_broadcast));
  m.impl("cfg_broadcast_", TORCH_BOX(&sgl_comm::cpu::cfg_broadcast_));
}
