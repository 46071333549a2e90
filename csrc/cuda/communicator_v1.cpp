#include "cuda/communicator_v1.h"

#include "check.h"
#include "cuda/cuda_check.h"
#include "cuda/pull_kernels.h"

namespace sgl_comm::cuda {

CommunicatorV1::CommunicatorV1(int rank, int world, int device, int64_t staging_bytes, Thresholds thresholds,
                               double timeout_seconds, uint64_t first_epoch, Ledger ledger)
    : DeviceCommunicator(rank, world, device, thresholds, timeout_seconds, first_epoch, std::move(ledger)),
      staging_bytes_(staging_bytes),
      graph_inputs_(rank, world, device) {
  SGL_CHECK(staging_bytes >= kMinStagingBytes && staging_bytes % kMinStagingBytes == 0, "init: got max_size ",
            staging_bytes, "; expected a multiple of ", kMinStagingBytes, " bytes");
}

CommunicatorHandle CommunicatorV1::publish() {
  const DeviceScope scope(device());
  const int64_t sums_bytes = staging_bytes_ / world() + device::kPackBytes;
  return DeviceCommunicator::publish(load_pull_kernels(world()), {device::kFlagBytes + staging_bytes_ + sums_bytes, 0});
}

std::string CommunicatorV1::attach(const std::vector<CommunicatorHandle>& handles) {
  const std::string reason = DeviceCommunicator::attach(handles);
  if (reason.empty()) graph_inputs_.attach(group(), kStagingOffset);
  return reason;
}

}  // namespace sgl_comm::cuda
