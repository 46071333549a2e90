// The compiled kernels of device/norm.cuh.
#include "cuda/device/compiled.cuh"
#include "cuda/device/norm.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

NormKernel norm_kernel(DType dtype, bool whole) {
  return visit_dtype(dtype, [&](auto d) -> NormKernel {
    using T = DeviceType<d.value>;
    return whole ? device::norm_kernel<T, true> : device::norm_kernel<T, false>;
  });
}

void load_norm_kernels() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool whole : {true, false}) {
      cudaFuncAttributes attributes{};
      SGL_CUDA_CHECK("init",
                     cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(norm_kernel(dtype, whole))));
    }
  }
}

}  // namespace sgl_comm::cuda
