// The groups that the CUDA library knows, each with the communicators that serve it.
#pragma once

#include <string>

#include "cuda/group/pull_communicator.h"
#include "cuda/group/push_communicator.h"
#include "registry.h"

namespace sgl_comm::cuda {

struct Group : GroupRecord {
  std::string backend;    // the group's own, which the fallback uses: "nccl", "gloo", ...
  bool cpu_only = false;  // initialised for the CPU: no kernels are tried
  Part<PushCommunicator> push;
  Part<PullCommunicator> pull;

  bool in_use() const { return cpu_only || push.open || pull.open; }
  bool settled() const { return cpu_only || push.settled || pull.settled; }

  // What serves sums: the push kernels' communicator, else the pull kernels', else null.
  DeviceCommunicator* serving() const {
    DeviceCommunicator* const pushing = push.serving();
    return pushing != nullptr ? pushing : pull.serving();
  }

  // Why a part does not serve; empty where it does, or where the group has only one rank.
  template <typename Communicator>
  std::string why_not(const Part<Communicator>& part) const {
    return cpu_only ? "the group was initialised with device='cpu'" : part.reason;
  }
};

using Groups = Registry<Group>;
using GroupPtr = Groups::GroupPtr;

inline Groups& groups() { return Groups::instance(); }

}  // namespace sgl_comm::cuda
