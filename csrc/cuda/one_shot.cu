#include "cuda/device/one_shot.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

PushKernel one_shot_kernel(DType dtype, int world, bool whole, bool ring) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_world(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (ring)
        return whole ? device::one_shot_ring_kernel<T, kWorld, true> : device::one_shot_ring_kernel<T, kWorld, false>;
      return whole ? device::one_shot_kernel<T, kWorld, true> : device::one_shot_kernel<T, kWorld, false>;
    });
  });
}

}  // namespace sgl_comm::cuda
