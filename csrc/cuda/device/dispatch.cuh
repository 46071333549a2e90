// From what the host knows of a call to the constants that kernels are compiled for.
#pragma once

#include <type_traits>

#include "cuda/device/pack.cuh"
#include "cuda/device/sizes.h"
#include "dispatch.h"

namespace sgl_comm::cuda {

// The element type of pack.cuh for a dtype.
template <DType kType>
struct DeviceTypeOf;
template <>
struct DeviceTypeOf<DType::kFloat32> {
  using Type = device::Float32;
};
template <>
struct DeviceTypeOf<DType::kBFloat16> {
  using Type = device::BFloat16;
};
template <>
struct DeviceTypeOf<DType::kFloat16> {
  using Type = device::Float16;
};
template <DType kType>
using DeviceType = typename DeviceTypeOf<kType>::Type;

// Calls visit(std::integral_constant<int, n>) for the kWorld of the kernels that serve a world of 2 to 8. From
// kFewestSharing to 7 ranks they are the shared ones; by default every world has its own.
constexpr int kNoneSharing = device::kMostShared + 1;
template <int kFewestSharing = kNoneSharing, typename Visitor>
decltype(auto) visit_kernel_world(int world, Visitor&& visit) {
  return visit_world(world, [&](auto n) -> decltype(auto) {
    constexpr int kExact = decltype(n)::value;
    constexpr bool kSharing = kExact >= kFewestSharing && kExact <= device::kMostShared;
    constexpr int kWorld = kSharing ? device::kSharedWorld : kExact;
    return visit(std::integral_constant<int, kWorld>{});
  });
}

}  // namespace sgl_comm::cuda
