// The groups that this library knows, each with its shared-memory communicator or without one.
#pragma once

#include "cpu/shm_communicator.h"
#include "registry.h"

namespace sgl_comm::cpu {

using Groups = Registry<ShmCommunicator>;

inline Groups& groups() {
  static Groups* const all = new Groups;  // never destroyed: threads may still call at exit
  return *all;
}

}  // namespace sgl_comm::cpu
