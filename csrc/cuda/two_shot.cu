// The compiled kernels of device/two_shot.cuh.
#include "cuda/device/compiled.cuh"
#include "cuda/device/two_shot.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

namespace {

template <bool kWhole, bool kGather>
PushKernel kernel_for(DType dtype, int world, bool ring) {
  constexpr int kFewestSharing = kWhole ? kNoneSharing : 5;
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<kFewestSharing>(world, [&](auto n) -> PushKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      return ring ? device::two_shot_ring_kernel<T, kWorld, kWhole, kGather>
                  : device::two_shot_kernel<T, kWorld, kWhole, kGather>;
    });
  });
}

}  // namespace

PushKernel two_shot_kernel(DType dtype, int world, bool whole, bool ring) {
  return whole ? kernel_for<true, true>(dtype, world, ring) : kernel_for<false, true>(dtype, world, ring);
}

PushKernel reduce_scatter_kernel(DType dtype, int world, bool whole, bool ring) {
  return whole ? kernel_for<true, false>(dtype, world, ring) : kernel_for<false, false>(dtype, world, ring);
}

}  // namespace sgl_comm::cuda
