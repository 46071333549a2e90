// The compiled kernels of device/all_reduce_layernorm.cuh.
#include "cuda/device/all_reduce_layernorm.cuh"
#include "cuda/device/compiled.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

LayerNormKernel all_reduce_layernorm_kernel(DType dtype, int world, FusedRows rows, int groups) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_kernel_world<true>(world, [&](auto n) -> LayerNormKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      switch (rows) {
        case FusedRows::kOne:
          return groups == 1 ? device::all_reduce_layernorm_kernel<T, kWorld, false, 1, 1, true>
                             : device::all_reduce_layernorm_kernel<T, kWorld, false, kMostGroups, kMostGroups, true>;
        case FusedRows::kMany:
          return groups == 1 ? device::all_reduce_layernorm_kernel<T, kWorld, false, 1, 1, false>
                             : device::all_reduce_layernorm_kernel<T, kWorld, false, kMostGroups, 1, false>;
        default:
          return groups == 1 ? device::all_reduce_layernorm_kernel<T, kWorld, true, 1, 1, false>
                             : device::all_reduce_layernorm_kernel<T, kWorld, true, kMostGroups, 1, false>;
      }
    });
  });
}

}  // namespace sgl_comm::cuda
