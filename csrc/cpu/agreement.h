// How ranks agree on a cfg_ call through shared memory, or through the group's own backend where there is none.
#pragma once

#include <string>

#include "cfg_calls.h"
#include "cpu/groups.h"

namespace sgl_comm::cpu {

// Why nobody makes the call: the texts differ, or this rank or another refuses it. Empty if all are alike. Every rank's
// answer is the same.
std::string compare_calls(const char* op, const GroupPtr& group, const std::string& text, bool refused);

// What run_agreed() of cfg_calls.h needs of any call; an op adds check(), describe() and run().
struct AgreedCall {
  const char* op;
  GroupPtr group;

  bool compares() const { return group->compare_calls && group->world > 1; }
  void compare(const std::string& text, bool refused) const {
    const std::string reason = compare_calls(op, group, text, refused);
    if (!reason.empty()) fail(reason);
  }
  void count_refusal() const {
    if (group->shm.serving() != nullptr) group->shm.serving()->count_refusal();
  }
  void count_call() const {}  // ShmCommunicator::begin() counts
  uint64_t num_begun() const { return group->shm.serving() != nullptr ? group->shm.serving()->sequence() : 0; }
};

}  // namespace sgl_comm::cpu
