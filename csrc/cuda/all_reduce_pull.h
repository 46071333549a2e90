// The sum over the ranks by the pull kernels.
#pragma once

#include "cuda/group/pull_communicator.h"
#include "tensor.h"

namespace sgl_comm::cuda {

// Sums `in` over the ranks into `out` (which may be `in`), on the current stream of their device. Both row-major.
void pull_all_reduce(const char* op, PullCommunicator& comm, const Tensor& in, Tensor& out);

}  // namespace sgl_comm::cuda
