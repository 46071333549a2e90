// The kernels that move bits: those of device/gather.cuh, and of device/broadcast.cuh.
#include "cuda/device/broadcast.cuh"
#include "cuda/device/compiled.cuh"
#include "cuda/device/gather.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

namespace {

template <typename T, bool kWhole>
PushKernel kernel_for(int world, bool ring) {
  constexpr int kFewestSharing = kWhole ? 6 : 5;
  return visit_kernel_world<kFewestSharing>(world, [&](auto n) -> PushKernel {
    constexpr int kWorld = n.value;
    return ring ? device::gather_ring_kernel<T, kWorld, kWhole> : device::gather_kernel<T, kWorld, kWhole>;
  });
}

}  // namespace

PushKernel gather_kernel(Unit unit, int world, bool ring) {
  switch (unit) {
    case Unit::kPacks:
      return kernel_for<device::BytePairs, true>(world, ring);
    case Unit::kBytePairs:
      return kernel_for<device::BytePairs, false>(world, ring);
    default:
      return kernel_for<device::Bytes, false>(world, ring);
  }
}

BroadcastKernel broadcast_kernel(Unit unit) {
  switch (unit) {
    case Unit::kPacks:
      return device::broadcast_kernel<device::RowMajor<device::BytePairs, true>>;
    case Unit::kBytePairs:
      return device::broadcast_kernel<device::RowMajor<device::BytePairs, false>>;
    default:
      return device::broadcast_kernel<device::RowMajor<device::Bytes, false>>;
  }
}

StridedBroadcastKernel strided_broadcast_kernel(int64_t unit_bytes) {
  switch (unit_bytes) {
    case 4:
      return device::broadcast_kernel<device::Strided<device::ByteQuads>>;
    case 2:
      return device::broadcast_kernel<device::Strided<device::BytePairs>>;
    default:
      return device::broadcast_kernel<device::Strided<device::Bytes>>;
  }
}

}  // namespace sgl_comm::cuda
