// The compiled kernels of device/one_shot.cuh.
#include "cuda/device/compiled.cuh"
#include "cuda/device/one_shot.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

PushKernel one_shot_kernel(DType dtype, int world, bool whole, Rounds rounds) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (rounds == Rounds::kRing)
        return whole ? device::one_shot_ring_kernel<T, kWorld, true> : device::one_shot_ring_kernel<T, kWorld, false>;
      if (whole && rounds == Rounds::kOne) return device::one_shot_kernel<T, kWorld>;
      return whole ? device::one_shot_loop_kernel<device::RowMajor<T, true>, kWorld>
                   : device::one_shot_loop_kernel<device::RowMajor<T, false>, kWorld>;
    });
  });
}

StridedKernel strided_one_shot_kernel(DType dtype, int world) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world(world, [&](auto n) -> StridedKernel {
      return device::one_shot_loop_kernel<device::Strided<DeviceType<d.value>>, n.value>;
    });
  });
}

}  // namespace sgl_comm::cuda
