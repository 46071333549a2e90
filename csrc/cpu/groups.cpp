// Set-up and tear-down of the CPU's part of a group, as ops that Python's ShmAllReduce calls.
#include "cpu/groups.h"

#include <torch/csrc/stable/library.h>

#include <memory>
#include <string>

#include "handles.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

void shm_open(const Text& name, int64_t rank, int64_t world, bool compare_calls) {
  SGL_CHECK(world >= 1 && rank >= 0 && rank < world, "init: got rank ", rank, " of world ", world,
            "; expected 0 <= rank < world");
  groups().open({name, static_cast<int>(rank), static_cast<int>(world), compare_calls}, [&](Group& group) {
    SGL_CHECK(!group.shm.open, "init: group '", name, "' already has a communicator; close() it first");
    group.shm.open = true;
  });
}

void shm_close(const Text& name) {
  groups().change(name, [](Group& group) { group.shm = {}; });
}

Tensor shm_publish(const Text& name, double timeout, int64_t first_epoch) {
  const auto group = groups().find_open("init", name);
  const auto communicator =
      std::make_shared<ShmCommunicator>(name, group->rank, group->world, timeout, static_cast<uint64_t>(first_epoch));
  const ShmHandle handle = communicator->publish();
  groups().change(name, [&](Group& changed) { changed.shm.communicator = communicator; });
  return to_bytes(handle);
}

std::string shm_attach(const Text& name, const Tensor& bytes) {
  const auto group = groups().find_open("init", name);
  return group->shm.communicator->attach(from_bytes<ShmHandle>(bytes, group->world));
}

void shm_settle(const Text& name, bool agreed) {
  const auto group = groups().find_open("init", name);
  if (agreed) group->shm.communicator->settle();
  groups().change(name, [&](Group& changed) { changed.shm.settle(agreed); });
}

std::string shm_fault(const Text& name) {
  const auto group = groups().find("check", name);
  return group->shm.serving() != nullptr ? group->shm.serving()->fault() : "";
}

int64_t layout_copies() { return num_layout_copies().load(); }

// The ledger for the CUDA library. A group without shared memory gets one that nobody else looks at.
Tensor ledger(const Text& name) {
  const auto group = groups().find_if_settled(name);
  ShmCommunicator* const comm = group != nullptr ? group->shm.serving() : nullptr;
  if (comm == nullptr) return Ledger().tensor();
  comm->share_ledger();
  return comm->ledger().tensor();
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("_shm_open", TORCH_BOX(&sgl_comm::cpu::shm_open));
  m.impl("_shm_close", TORCH_BOX(&sgl_comm::cpu::shm_close));
  m.impl("_shm_publish", TORCH_BOX(&sgl_comm::cpu::shm_publish));
  m.impl("_shm_attach", TORCH_BOX(&sgl_comm::cpu::shm_attach));
  m.impl("_shm_settle", TORCH_BOX(&sgl_comm::cpu::shm_settle));
  m.impl("_shm_fault", TORCH_BOX(&sgl_comm::cpu::shm_fault));
  m.impl("_ledger", TORCH_BOX(&sgl_comm::cpu::ledger));
  m.impl("_layout_copies", TORCH_BOX(&sgl_comm::cpu::layout_copies));
}
