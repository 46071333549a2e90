// The groups that the CUDA library knows, each with its communicators or without.
#pragma once

#include <string>

#include "cuda/communicator_v1.h"
#include "cuda/communicator_v2.h"
#include "registry.h"

namespace sgl_comm::cuda {

using GroupsV2 = Registry<CommunicatorV2>;
using GroupsV1 = Registry<CommunicatorV1>;

// Every group of the package is open here; its communicator is null where the push kernels do not serve it.
inline GroupsV2& groups_v2() { return GroupsV2::instance(); }
// Open here is a group for which V1 was tried.
inline GroupsV1& groups_v1() { return GroupsV1::instance(); }

}  // namespace sgl_comm::cuda
