#include "cuda/device/pull.cuh"
#include "cuda/pull_kernels.h"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

PullKernel pull_kernel(DType dtype, int world, bool whole, bool one_shot) {
  return visit_dtype(dtype, [&](auto d) {
    return visit_world(world, [&](auto n) -> PullKernel {
      using T = DeviceType<d.value>;
      constexpr int kWorld = n.value;
      if (one_shot) {
        return whole ? device::one_shot_pull_kernel<T, kWorld, true> : device::one_shot_pull_kernel<T, kWorld, false>;
      }
      return whole ? device::two_shot_pull_kernel<T, kWorld, true> : device::two_shot_pull_kernel<T, kWorld, false>;
    });
  });
}

Residency load_pull_kernels(int world) {
  Residency residency;
  load_norm_kernels();
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const bool whole : {true, false}) {
      for (const bool one_shot : {true, false}) {
        residency.add(Kind::kPull, reinterpret_cast<const void*>(pull_kernel(dtype, world, whole, one_shot)));
      }
    }
  }
  return residency;
}

}  // namespace sgl_comm::cuda
