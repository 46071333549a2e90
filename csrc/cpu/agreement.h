// Agreement on calls by way of shared memory, or of the group's own backend where there is none.
#pragma once

#include <string>
#include <utility>

#include "cfg_calls.h"
#include "cpu/groups.h"

namespace sgl_comm::cpu {

// Why nobody makes the call: the texts differ, or this rank or another refuses it. Empty if all are alike. Every rank's
// answer is the same.
std::string compare_calls(const char* op, const Groups::GroupPtr& group, const std::string& text, bool refused);

// See agree() and make_agreed(). Refusals are counted by ShmCommunicator::count_refusal.
template <typename Checks, typename Describe, typename Make>
auto call_agreed(const char* op, const Groups::GroupPtr& group, Checks&& checks, Describe&& describe, Make&& make) {
  ShmCommunicator* const comm = group->communicator.get();
  const auto compare = [&](const std::string& text, bool refused) {
    const std::string reason = compare_calls(op, group, text, refused);
    if (!reason.empty()) fail(reason);
  };
  const auto count_refusal = [&] {
    if (comm != nullptr) comm->count_refusal();
  };
  agree(*group, std::forward<Checks>(checks), std::forward<Describe>(describe), compare, count_refusal);
  const auto begun = [&] { return comm != nullptr ? comm->sequence() : 0; };
  return make_agreed(begun, count_refusal, std::forward<Make>(make));
}

}  // namespace sgl_comm::cpu
