// Agreement on calls of CUDA tensors: compared by the CPU's library, refusals counted by the communicator that would
// have served.
#pragma once

#include <string>
#include <utility>

#include "cfg_calls.h"
#include "cuda/groups.h"
#include "cuda/launch.h"

namespace sgl_comm::cuda {

// The push or the pull kernels' communicator of a group; null where it has neither. Lives as long as the groups do.
struct Serving {
  GroupsV2::GroupPtr push;
  GroupsV1::GroupPtr pull;
  explicit Serving(const GroupsV2::GroupPtr& group)
      : push(group), pull(group->communicator == nullptr ? groups_v1().find_if_settled(group->name) : nullptr) {}
  DeviceCommunicator* communicator() const {
    if (push->communicator != nullptr) return push->communicator.get();
    return pull != nullptr ? pull->communicator.get() : nullptr;
  }
};

void compare_calls(const char* op, const std::string& group_name, const std::string& text, bool refused);

// See agree(). Checks also that the tensor is on the group's device.
template <typename Checks, typename Describe>
void agree_on_call(const char* op, const GroupsV2::GroupPtr& group, const Tensor& input, Checks&& checks,
                   Describe&& describe) {
  const Serving serving(group);
  DeviceCommunicator* const comm = serving.communicator();
  const auto all_checks = [&] {
    checks();
    if (comm != nullptr) check_on_device(op, *comm, input);
  };
  const auto compare = [&](const std::string& text, bool refused) { compare_calls(op, group->name, text, refused); };
  const auto count_refusal = [&] {
    if (comm != nullptr) comm->count_refusal();
  };
  agree(*group, all_checks, std::forward<Describe>(describe), compare, count_refusal);
}

}  // namespace sgl_comm::cuda
