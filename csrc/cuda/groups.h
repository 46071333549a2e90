// The groups that the CUDA library knows, each with its push communicator or without one.
#pragma once

#include "cuda/communicator_v2.h"
#include "registry.h"

namespace sgl_comm::cuda {

using Groups = Registry<CommunicatorV2>;

inline Groups& groups() { return Groups::instance(); }

}  // namespace sgl_comm::cuda
