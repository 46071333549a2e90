#include "cuda/device/all_reduce_layernorm.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

LayerNormKernel all_reduce_layernorm_kernel(DType dtype, int world, bool two_shot, int groups) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_world(world, [&](auto n) -> LayerNormKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (groups == 1) {
        return two_shot ? device::all_reduce_layernorm_kernel<T, kWorld, true, 1>
                        : device::all_reduce_layernorm_kernel<T, kWorld, false, 1>;
      }
      return two_shot ? device::all_reduce_layernorm_kernel<T, kWorld, true, kMostGroups>
                      : device::all_reduce_layernorm_kernel<T, kWorld, false, kMostGroups>;
    });
  });
}

}  // namespace sgl_comm::cuda
