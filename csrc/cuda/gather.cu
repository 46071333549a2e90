// The kernels that move bits: those of device/gather.cuh, and of device/broadcast.cuh.
#include "cuda/device/broadcast.cuh"
#include "cuda/device/compiled.cuh"
#include "cuda/device/gather.cuh"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

PushKernel gather_kernel(Unit unit, int world, bool ring) {
  return visit_kernel_world<true>(world, [&](auto n) -> PushKernel {
    constexpr int kWorld = n.value;
    switch (unit) {
      case Unit::kPacks:
        return ring ? device::gather_ring_kernel<device::BytePairs, kWorld, true>
                    : device::gather_kernel<device::BytePairs, kWorld, true>;
      case Unit::kBytePairs:
        return ring ? device::gather_ring_kernel<device::BytePairs, kWorld, false>
                    : device::gather_kernel<device::BytePairs, kWorld, false>;
      default:
        return ring ? device::gather_ring_kernel<device::Bytes, kWorld, false>
                    : device::gather_kernel<device::Bytes, kWorld, false>;
    }
  });
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
