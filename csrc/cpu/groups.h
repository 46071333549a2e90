// The groups that this library knows, each with its shared-memory communicator or without one.
#pragma once

#include "cpu/shm_communicator.h"
#include "registry.h"

namespace sgl_comm::cpu {

using Groups = Registry<ShmCommunicator>;

inline Groups& groups() { return Groups::instance(); }

// Runs the checks of a call, and counts it where they refuse it (ShmCommunicator::count_refusal).
template <typename Checks>
void counting_refusals(const Groups::GroupPtr& group, Checks&& checks) {
  try {
    checks();
  } catch (...) {
    if (group->communicator != nullptr) group->communicator->count_refusal();
    throw;
  }
}

}  // namespace sgl_comm::cpu
