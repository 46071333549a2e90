// The sum over the ranks by the push kernels.
#pragma once

#include <string>

#include "cuda/group/push_communicator.h"
#include "tensor.h"

namespace sgl_comm::cuda {

// Sums `in` over the ranks into `out` (which may be `in`), on the current stream of their device. Both row-major.
void push_all_reduce(const char* op, PushCommunicator& comm, const Tensor& in, Tensor& out, const std::string& algo);

// push_all_reduce() by one launch that walks the tensors' strides. Returns false, and has done nothing, where copies
// and push_all_reduce() are faster, or both tensors are row-major. `out` may be `in` if no two of its elements share
// memory.
bool push_strided_all_reduce(const char* op, PushCommunicator& comm, const Tensor& in, Tensor& out);

}  // namespace sgl_comm::cuda
