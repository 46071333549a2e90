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

// Calls visit(std::integral_constant<int, n>) for the kWorld of the kernels that serve a world of 2 to 8. From
// kFewestSharing to 7 ranks they are the shared ones; by default every world has its own.
constexpr int kNoneSharing = device::kMostShared + 1;
template <int kFewestSharing = kNoneSharing, typename Visitor>
decltype(auto) visit_kernel_world(int world, Visitor&& visit) {
  return visit_world(world, [&](auto n) -> decltype(auto) {
    constexpr int kExact = decltype(n)::value;
    constexpr bool kSharing = kExact >= kFewestSharing && kExact <= device::kMostShared;
    constexpr int kWorld = kSharing ? device::kShared : kExact;
    return visit(std::integral_constant<int, kWorld>{});
  });
}

}  // namespace sgl_comm::cuda
