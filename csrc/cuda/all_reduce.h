// What the set-up of a group needs to know of the all-reduce kernels.
#pragma once

#include "cuda/communicator_v2.h"

namespace sgl_comm::cuda {

// Loads every kernel of this world on the current device, and counts how many blocks of the greediest of each kind fit
// on it at once.
Residency load_all_reduce_kernels(int world);

}  // namespace sgl_comm::cuda
