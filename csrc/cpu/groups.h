// The groups that this library knows, each with its shared-memory communicator or without one.
#pragma once

#include "cpu/shm_communicator.h"
#include "registry.h"

namespace sgl_comm::cpu {

using Groups = Registry<ShmCommunicator>;

inline Groups& groups() { return Groups::instance(); }

}  // namespace sgl_comm::cpu
