#include "cuda/communicator_v2.h"

#include "check.h"
#include "cuda/cuda_check.h"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

CommunicatorV2::CommunicatorV2(int rank, int world, int device, int64_t slot_bytes, Thresholds thresholds,
                               double timeout_seconds, uint64_t first_epoch, Ledger ledger)
    : DeviceCommunicator(rank, world, device, thresholds, timeout_seconds, first_epoch, std::move(ledger)),
      slot_bytes_(slot_bytes) {
  SGL_CHECK(slot_bytes >= kMinSlotBytes && slot_bytes <= kMaxSlotBytes && slot_bytes % kMinSlotBytes == 0,
            "init: got max_size ", slot_bytes, "; expected a multiple of ", kMinSlotBytes, " bytes up to ",
            kMaxSlotBytes);
}

CommunicatorHandle CommunicatorV2::publish() {
  const DeviceScope scope(device());
  return DeviceCommunicator::publish(
      load_push_kernels(world()),
      {device::kCreditsBytes + device::kCountsBytes, device::kBanks * bank_bytes() + device::kBroadcastBytes});
}

}  // namespace sgl_comm::cuda
