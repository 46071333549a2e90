// The pull kernels by what the host knows at run time. Nothing of torch: the kernels' own file reads this.
#pragma once

#include "cuda/device/parameters.h"
#include "cuda/residency.h"
#include "dispatch.h"

namespace sgl_comm::cuda {

using PullKernel = void (*)(device::PullMessage);

// whole: this rank's tensors are 16-byte aligned and a whole number of packs.
PullKernel pull_kernel(DType dtype, int world, bool whole, bool one_shot);

// Loads every kernel of this world on the current device, and counts how many blocks fit on it at once.
Residency load_pull_kernels(int world);

}  // namespace sgl_comm::cuda
