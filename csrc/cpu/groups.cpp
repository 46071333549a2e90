// Set-up and tear-down of groups, as ops that Python's Communicator calls.
#include "cpu/groups.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <utility>

#include "handles.h"
#include "tensor.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

void group_open(const Text& name, int64_t rank, int64_t world, bool compare_calls) {
  SGL_CHECK(world >= 1 && rank >= 0 && rank < world, "init: got rank ", rank, " of world ", world,
            "; expected 0 <= rank < world");
  groups().open(name, static_cast<int>(rank), static_cast<int>(world), "", compare_calls);
}

void group_close(const Text& name) { groups().close(name); }

Tensor shm_publish(const Text& name, double timeout, int64_t first_epoch) {
  const auto group = groups().find_open("init", name);
  auto communicator = std::make_unique<ShmCommunicator>(name, group->rank, group->world, timeout, first_epoch);
  const ShmHandle handle = communicator->publish();
  group->communicator = std::move(communicator);
  return to_bytes(handle);
}

std::string shm_attach(const Text& name, const Tensor& bytes) {
  const auto group = groups().find_open("init", name);
  return group->communicator->attach(from_bytes<ShmHandle>(bytes, group->world));
}

void shm_settle(const Text& name, bool agreed) { groups().settle(name, agreed); }

int64_t layout_copies() { return num_layout_copies().load(); }

// For the CUDA library; of a group that has no shared memory, one that nobody else looks at.
Tensor ledger(const Text& name) {
  const auto group = groups().find_if_settled(name);
  if (group == nullptr || group->communicator == nullptr) return Ledger().tensor();
  group->communicator->share_ledger();
  return group->communicator->ledger().tensor();
}

std::string shm_fault(const Text& name) { return groups().fault(name); }

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("_group_open", TORCH_BOX(&sgl_comm::cpu::group_open));
  m.impl("_group_close", TORCH_BOX(&sgl_comm::cpu::group_close));
  m.impl("_shm_publish", TORCH_BOX(&sgl_comm::cpu::shm_publish));
  m.impl("_shm_attach", TORCH_BOX(&sgl_comm::cpu::shm_attach));
  m.impl("_shm_settle", TORCH_BOX(&sgl_comm::cpu::shm_settle));
  m.impl("_shm_fault", TORCH_BOX(&sgl_comm::cpu::shm_fault));
  m.impl("_ledger", TORCH_BOX(&sgl_comm::cpu::ledger));
  m.impl("_layout_copies", TORCH_BOX(&sgl_comm::cpu::layout_copies));
}
