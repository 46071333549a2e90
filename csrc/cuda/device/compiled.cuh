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

// Calls visit(std::integral_constant<int, n>) for the kWorld of the kernels that serve a world of 2 to 8. 7 ranks have
// those that 5 to 7 can share (kSharedWorld); kShared: 5 and 6 have them too.
template <bool kShared, typename Visitor>
decltype(auto) visit_kernel_world(int world, Visitor&& visit) {
  static_assert(device::kFewestShared == 5 && device::kSharedWorld == 7);
  switch (world) {
    case 3:
      return visit(std::integral_constant<int, 3>{});
    case 4:
      return visit(std::integral_constant<int, 4>{});
    case 5:
      return visit(std::integral_constant < int, kShared ? device::kSharedWorld : 5 > {});
    case 6:
      return visit(std::integral_constant < int, kShared ? device::kSharedWorld : 6 > {});
    case 7:
      return visit(std::integral_constant<int, device::kSharedWorld>{});
    case 8:
      return visit(std::integral_constant<int, 8>{});
    default:
      return visit(std::integral_constant<int, 2>{});
  }
}

}  // namespace sgl_comm::cuda
