// The groups that this library knows, each with its shared-memory communicator or without one.
#pragma once

#include "cpu/shm_communicator.h"
#include "registry.h"

namespace sgl_comm::cpu {

struct Group : GroupRecord {
  Part<ShmCommunicator> shm;
  double waits_end_at = 0;  // in seconds of steady_clock, for a group that the grafter made; 0 is never

  bool in_use() const { return shm.open; }
  bool settled() const { return shm.settled; }
};

using Groups = Registry<Group>;
using GroupPtr = Groups::GroupPtr;

inline Groups& groups() { return Groups::instance(); }

}  // namespace sgl_comm::cpu
