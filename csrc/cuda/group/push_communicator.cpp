#include "cuda/group/push_communicator.h"

#include <utility>

#include "check.h"
#include "cuda/cuda_check.h"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::cuda {

PushCommunicator::PushCommunicator(const CommunicatorOptions& options, Ledger ledger)
    : DeviceCommunicator(options, std::move(ledger)), sender_bytes_(options.max_size) {
  SGL_CHECK(sender_bytes_ >= kMinSize && sender_bytes_ <= kMaxSize && sender_bytes_ % kMinSize == 0,
            "init: got max_size ", sender_bytes_, "; expected a multiple of ", kMinSize, " bytes up to ", kMaxSize);
}

CommunicatorHandle PushCommunicator::publish() {
  const DeviceScope scope(device());
  WorkspaceBytes bytes;
  bytes.zeros = device::kCreditsBytes + device::kCountsBytes;
  bytes.ones = device::kBuffers * buffer_bytes() + device::kBroadcastBytes;
  return DeviceCommunicator::publish(Residency::load(push_kernel_table(world())), bytes);
}

}  // namespace sgl_comm::cuda
