// The sum over ranks on the CPU, for the ops that begin with it.
#pragma once

#include "cpu/groups.h"
#include "ops.h"
#include "tensor.h"

namespace sgl_comm::cpu {

// A fresh row-major tensor: the sum of every rank's `input`, through shared memory where that serves the group and
// dtype, else by the group's own backend. `id` is what the ranks must all call.
Tensor sum_over_ranks(const char* op, Op id, const Group& group, const Tensor& input);

}  // namespace sgl_comm::cpu
