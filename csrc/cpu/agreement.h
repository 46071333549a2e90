// Before a call is made: what this rank finds wrong with it and, where the group has SGL_COMM_CHECK, whether all ranks
// are about to make the same.
#pragma once

#include <exception>
#include <string>
#include <vector>

#include "cpu/groups.h"

namespace sgl_comm::cpu {

// Every rank's text, in rank order; a step of its own.
std::vector<std::string> texts_of_ranks(const char* op, const Groups::GroupPtr& group, const std::string& text);

// Throws on every rank unless all texts are alike and no call is refused; then nobody makes the call.
void compare_calls(const char* op, const Groups::GroupPtr& group, const std::string& text, bool refused);

// `checks` refuse what this rank is given by throwing; describe() is the call in words, alike where the calls are. With
// SGL_COMM_CHECK every rank learns of a refusal or a difference, and all are in step still. Without it a refusal is
// counted (ShmCommunicator::count_refusal).
template <typename Checks, typename Describe>
void agree_on_call(const char* op, const Groups::GroupPtr& group, Checks&& checks, Describe&& describe) {
  const bool compare = group->compare_calls && group->world > 1;
  try {
    checks();
  } catch (const std::exception& error) {
    if (compare) compare_calls(op, group, error.what(), true);
    if (group->communicator != nullptr) group->communicator->count_refusal();
    throw;
  }
  if (__builtin_expect(compare, 0)) compare_calls(op, group, describe(), false);
}

}  // namespace sgl_comm::cpu
