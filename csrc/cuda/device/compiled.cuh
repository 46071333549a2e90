// From what the host knows of a call to the constants that kernels are compiled for.
#pragma once

#include <type_traits>

#include "cuda/device/pack.cuh"
#include "cuda/device/sizes.h"
#include "dispatch.h"

namespace sgl_comm::cuda {

template <DType kType>
using DeviceType = std::conditional_t<kType == DType::kFloat32, device::Float32,
                                      std::conditional_t<kType == DType::kBFloat16, device::BFloat16, device::Float16>>;

// Calls visit(std::integral_constant<int, n>) for the kWorld of the kernels that serve a world of 2 to 8.
template <typename Visitor>
decltype(auto) visit_kernel_world(int world, Visitor&& visit) {
  switch (world) {
    case 3:
      return visit(std::integral_constant<int, 3>{});
    case 4:
      return visit(std::integral_constant<int, 4>{});
    case 5:
    case 6:
    case 7:
      return visit(std::integral_constant<int, device::kSharedWorld>{});
    case 8:
      return visit(std::integral_constant<int, 8>{});
    default:
      return visit(std::integral_constant<int, 2>{});
  }
}

}  // namespace sgl_comm::cuda
