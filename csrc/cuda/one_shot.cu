// The compiled kernels of device/one_shot.cuh.
#include "cuda/device/compiled.cuh"
#include "cuda/device/one_shot.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

namespace {

PushKernel whole_kernel(DType dtype, int world, Rounds rounds) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      switch (rounds) {
        case Rounds::kOne:
          return device::one_shot_kernel<T, kWorld>;
        case Rounds::kMany:
          return device::one_shot_loop_kernel<device::RowMajor<T, true>, kWorld>;
        default:
          return device::one_shot_ring_kernel<T, kWorld, true>;
      }
    });
  });
}

PushKernel odd_kernel(DType dtype, int world, bool ring) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<5>(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      return ring ? device::one_shot_ring_kernel<T, kWorld, false>
                  : device::one_shot_loop_kernel<device::RowMajor<T, false>, kWorld>;
    });
  });
}

}  // namespace

PushKernel one_shot_kernel(DType dtype, int world, bool whole, Rounds rounds) {
  return whole ? whole_kernel(dtype, world, rounds) : odd_kernel(dtype, world, rounds == Rounds::kRing);
}

StridedKernel strided_one_shot_kernel(DType dtype, int world) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<6>(world, [&](auto n) -> StridedKernel {
      return device::one_shot_loop_kernel<device::Strided<DeviceType<d.value>>, n.value>;
    });
  });
}

}  // namespace sgl_comm::cuda
