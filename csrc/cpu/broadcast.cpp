// cfg_broadcast between the processes of one host, through shared memory; by the fallback for other devices.
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
void broadcast(const char* op, ShmCommunicator& comm, Op id, int64_t src, Tensor& memory) {
  const auto count = static_cast<size_t>(memory.numel()), bytes = count * memory.element_size();
  const bool source = comm.rank() == src;
  const std::byte* const in = source ? static_cast<const std::byte*>(memory.const_data_ptr()) : nullptr;
  std::byte* const out = source ? nullptr : static_cast<std::byte*>(memory.mutable_data_ptr());
  const auto turn = comm.begin(op, {id, memory.scalar_type(), count, static_cast<uint8_t>(src)});
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

// The communicator that moves this tensor, or null where the group's own backend does.
ShmCommunicator* shm_for(const Group& group, const Tensor& input) {
  return input.is_cpu() ? group.shm.serving() : nullptr;
}

struct CfgBroadcast : AgreedCall {
  Tensor input;
  int64_t src;

  bool is_source() const { return group->rank == src; }
  void check() const { check_broadcast(op, input, src, group->world); }
  std::string describe() const { return describe_broadcast(input, src); }
  Tensor run() const {
    if (group->world == 1) return fresh_row_major(op, input);
    ShmCommunicator* const comm = shm_for(*group, input);
    if (comm == nullptr) return fallback::broadcast(op, input, src, group->name, group->rank);
    Tensor out = is_source() ? fresh_row_major(op, input) : empty_row_major(op, input);
    broadcast(op, *comm, Op::kBroadcast, src, out);
    return out;
  }
};

struct CfgBroadcastInPlace : CfgBroadcast {
  void check() const {
    CfgBroadcast::check();
    check_disjoint(op, input);
  }
  void run() {
    if (group->world == 1) return;
    ShmCommunicator* const comm = shm_for(*group, input);
    if (comm == nullptr) {
      const Tensor sent = fallback::broadcast(op, input, src, group->name, group->rank);
      if (!is_source()) torch::stable::copy_(input, sent);
    } else if (is_source()) {
      Tensor in = row_major(input);
      broadcast(op, *comm, Op::kBroadcast, src, in);
    } else {
      overwrite(op, input, [&](Tensor& out) { broadcast(op, *comm, Op::kBroadcast, src, out); });
    }
  }
};

Tensor cfg_broadcast(const Tensor& input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast";
  return run_agreed(CfgBroadcast{{kOp, groups().find(kOp, group_name)}, input, src});
}

void cfg_broadcast_(Tensor input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast_";
  run_agreed(CfgBroadcastInPlace{{{kOp, groups().find(kOp, group_name)}, input, src}});
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cpu::cfg_broadcast));
  m.impl("cfg_broadcast_", TORCH_BOX(&sgl_comm::cpu::cfg_broadcast_));
}

// Devices without a form of their own; their in-place calls are the functional one and a copy (sgl_comm/ops.py).
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::cpu::cfg_broadcast));
}
