// The compiled kernels of device/pull.cuh.
#include "cuda/device/compiled.cuh"
#include "cuda/device/pull.cuh"
#include "cuda/pull_kernels.h"

namespace sgl_comm::cuda {

PullKernel pull_kernel(DType dtype, int world, bool whole, bool one_shot) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<5>(world, [&](auto n) -> PullKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (one_shot) {
        return whole ? device::one_shot_pull_kernel<T, kWorld, true> : device::one_shot_pull_kernel<T, kWorld, false>;
      }
      return whole ? device::two_shot_pull_kernel<T, kWorld, true> : device::two_shot_pull_kernel<T, kWorld, false>;
    });
  });
}

}  // namespace sgl_comm::cuda
