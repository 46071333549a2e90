#include "cuda/pull_kernels.h"

#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

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
