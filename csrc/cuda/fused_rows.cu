// The compiled kernels of device/all_reduce_layernorm.cuh.
#include "cuda/device/all_reduce_layernorm.cuh"
#include "cuda/device/compiled.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

LayerNormKernel all_reduce_layernorm_kernel(DType dtype, int world, FusedRows rows, int groups) {
  return visit_dtype(dtype, [&](auto d) {
    using T = DeviceType<d.value>;
    if (groups != 1 && rows != FusedRows::kOne) {  // rows too wide for one group a slot
      return visit_kernel_world<5>(world, [&](auto n) -> LayerNormKernel {
        return rows == FusedRows::kMany ? device::all_reduce_layernorm_kernel<T, n.value, false, kMostGroups, 1, false>
                                        : device::all_reduce_layernorm_kernel<T, n.value, true, kMostGroups, 1, false>;
      });
    }
    return visit_kernel_world(world, [&](auto n) -> LayerNormKernel {
      constexpr int kWorld = n.value;
      switch (rows) {
        case FusedRows::kOne:
          return groups == 1 ? device::all_reduce_layernorm_kernel<T, kWorld, false, 1, 1, true>
                             : device::all_reduce_layernorm_kernel<T, kWorld, false, kMostGroups, kMostGroups, true>;
        case FusedRows::kMany:
          return device::all_reduce_layernorm_kernel<T, kWorld, false, 1, 1, false>;
        default:
          return device::all_reduce_layernorm_kernel<T, kWorld, true, 1, 1, false>;
      }
    });
  });
}

}  // namespace sgl_comm::cuda
