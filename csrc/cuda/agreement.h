// Agreement on calls of CUDA tensors: compared by the CPU's library, refusals counted by the communicator that would
// have served.
#pragma once

#include <string>
#include <utility>

#include "cfg_calls.h"
#include "cuda/groups.h"
#include "cuda/launch.h"

namespace sgl_comm::cuda {

// What serves a group: the push kernels' communicator, else the pull kernels'. Keeps it alive.
struct Serving {
  GroupsV2::GroupPtr push;
  GroupsV1::GroupPtr pull;
  explicit Serving(const GroupsV2::GroupPtr& group)
      : push(group), pull(group->communicator == nullptr ? groups_v1().find_if_settled(group->name) : nullptr) {}
  // Null where neither does.
  DeviceCommunicator* communicator() const {
    if (push->communicator != nullptr) return push->communicator.get();
    return pull != nullptr ? pull->communicator.get() : nullptr;
  }
};

// Counted once for the group, and told to the peers of both its communicators.
void count_refusal(const GroupsV2::GroupPtr& group);

void compare_calls(const char* op, const std::string& group_name, const std::string& text, bool refused);

// See agree() and make_agreed(). Checks also that the tensor is on the group's device.
template <typename Checks, typename Describe, typename Make>
auto call_agreed(const char* op, const GroupsV2::GroupPtr& group, const Tensor& input, Checks&& checks,
                 Describe&& describe, Make&& make) {
  const Serving serving(group);
  DeviceCommunicator* const comm = serving.communicator();
  const auto all_checks = [&] {
    checks();
    if (comm != nullptr) check_on_device(op, *comm, input);
  };
  const auto compare = [&](const std::string& text, bool refused) { compare_calls(op, group->name, text, refused); };
  const auto count = [&] { count_refusal(group); };
  agree(*group, all_checks, std::forward<Describe>(describe), compare, count);
  if (comm != nullptr) comm->ledger().count_cuda_call();
  const auto begun = [&] { return comm != nullptr ? comm->num_calls() : 0; };
  return make_agreed(begun, count, std::forward<Make>(make));
}

}  // namespace sgl_comm::cuda
