// The pull kernels by what the host knows at run time. Nothing of torch: the kernels' own file reads this.
#pragma once

#include "cuda/device/parameters.h"
#include "cuda/kernels/push_kernels.h"
#include "cuda/kernels/residency.h"
#include "dispatch.h"

namespace sgl_comm::cuda {

using PullKernel = void (*)(device::PullParameters);

// aligned: this rank's tensors are 16-byte aligned and a whole number of packs.
PullKernel pull_kernel(DType dtype, int world, bool aligned, bool one_shot);

// Every kernel that a group of so many ranks may launch, to be loaded at init.
inline KernelTable pull_kernel_table(int world) {
  KernelTable table = norm_kernel_table();
  for (const DType dtype : kSummedDTypes) {
    for (const bool aligned : {true, false}) {
      for (const bool one_shot : {true, false}) {
        table.add(KernelKind::kPull, pull_kernel(dtype, world, aligned, one_shot));
      }
    }
  }
  return table;
}

}  // namespace sgl_comm::cuda
