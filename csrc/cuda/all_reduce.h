// The sum over ranks between GPUs, for the ops that begin with it.
#pragma once

#include "cuda/group/groups.h"
#include "tensor.h"

namespace sgl_comm::cuda {

// A fresh row-major tensor: the sum of every rank's row-major `input`, by the kernels where they serve the group, dtype
// and size, else by the group's own backend.
Tensor sum_over_ranks(const char* op, const Group& group, const Tensor& input);

}  // namespace sgl_comm::cuda
