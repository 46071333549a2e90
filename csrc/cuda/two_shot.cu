// The compiled kernels of device/two_shot.cuh.
#include "cuda/device/compiled.cuh"
#include "cuda/device/two_shot.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

namespace {

template <bool kGather>
PushKernel kernel_for(DType dtype, int world, bool whole, bool ring) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (ring) {
        return whole ? device::two_shot_ring_kernel<T, kWorld, true, kGather>
                     : device::two_shot_ring_kernel<T, kWorld, false, kGather>;
      }
      return whole ? device::two_shot_kernel<T, kWorld, true, kGather>
                   : device::two_shot_kernel<T, kWorld, false, kGather>;
    });
  });
}

}  // namespace

PushKernel two_shot_kernel(DType dtype, int world, bool whole, bool ring) {
  return kernel_for<true>(dtype, world, whole, ring);
}

PushKernel reduce_scatter_kernel(DType dtype, int world, bool whole, bool ring) {
  return kernel_for<false>(dtype, world, whole, ring);
}

}  // namespace sgl_comm::cuda
