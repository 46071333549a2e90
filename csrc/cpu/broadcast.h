// A broadcast through shared memory, by whatever op.
#pragma once

#include "cpu/shm_communicator.h"
#include "tensor.h"

namespace sgl_comm::cpu {

// `memory` is row-major: read on rank src, written on the others. The source does not wait for its peers.
void broadcast(const char* op, ShmCommunicator& comm, Op id, int64_t src, Tensor& memory);

}  // namespace sgl_comm::cpu
