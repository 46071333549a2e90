// cfg_broadcast between the processes of one host, through shared memory.
#include "cpu/broadcast.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "cfg_calls.h"
#include "cpu/agreement.h"
#include "fallback.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

// The source's bytes pass through its slot, a chunk a step: copied once in and, by each peer, once out. The source goes
// on at once, two chunks ahead of its peers at most. There is one step at least, so that an empty call, too, must be
// the same on all ranks.
void broadcast(const char* op, ShmCommunicator& comm, Call::Kind kind, int64_t src, Tensor& buffer) {
  const auto count = static_cast<size_t>(buffer.numel()), bytes = count * buffer.element_size();
  const bool source = comm.rank() == src;
  const std::byte* const in = source ? static_cast<const std::byte*>(buffer.const_data_ptr()) : nullptr;
  std::byte* const out = source ? nullptr : static_cast<std::byte*>(buffer.mutable_data_ptr());
  const auto turn = comm.begin(op, {kind, buffer.scalar_type(), count, static_cast<uint8_t>(src)});
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
    first += length;
    // Where the group has a GPU part its peers must be here: they may else wait in a call of CUDA tensors.
    if (first >= bytes && comm.ledger_shared()) {
      comm.await_arrivals();
    } else {
      comm.await_later();
    }
  } while (first < bytes);
}

namespace {

Tensor received(const char* op, const Groups::GroupPtr& group, const Tensor& input, int64_t src) {
  if (group->world == 1) return fresh_row_major(op, input);
  if (group->communicator == nullptr) return fallback::broadcast(op, input, src, group->name, group->rank);
  Tensor out = group->rank == src ? fresh_row_major(op, input) : empty_row_major(op, input);
  broadcast(op, *group->communicator, Call::Kind::kBroadcast, src, out);
  return out;
}

void receive_in_place(const char* op, const Groups::GroupPtr& group, Tensor& input, int64_t src) {
  if (group->world == 1) return;
  const bool source = group->rank == src;
  if (group->communicator == nullptr) {
    const Tensor sent = fallback::broadcast(op, input, src, group->name, group->rank);
    if (!source) torch::stable::copy_(input, sent);
  } else if (source) {
    Tensor in = row_major(input);
    broadcast(op, *group->communicator, Call::Kind::kBroadcast, src, in);
  } else {
    overwrite(op, input, [&](Tensor& out) { broadcast(op, *group->communicator, Call::Kind::kBroadcast, src, out); });
  }
}

Tensor cfg_broadcast(const Tensor& input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast";
  const auto group = groups().find(kOp, group_name);
  return call_agreed(
      kOp, group, [&] { check_broadcast(kOp, input, src, group->world); },
      [&] { return describe_broadcast(input, src); }, [&] { return received(kOp, group, input, src); });
}

void cfg_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast_";
  const auto group = groups().find(kOp, group_name);
  const auto checks = [&] {
    check_broadcast(kOp, input, src, group->world);
    check_disjoint(kOp, input);
  };
  call_agreed(
      kOp, group, checks, [&] { return describe_broadcast(input, src); },
      [&] { receive_in_place(kOp, group, input, src); });
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cpu::cfg_broadcast));
  m.impl("cfg_broadcast_", TORCH_BOX(&sgl_comm::cpu::cfg_broadcast_));
}
