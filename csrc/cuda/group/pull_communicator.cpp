#include "cuda/group/pull_communicator.h"

#include <utility>

#include "check.h"
#include "cuda/cuda_check.h"
#include "cuda/kernels/pull_kernels.h"

namespace sgl_comm::cuda {

PullCommunicator::PullCommunicator(const CommunicatorOptions& options, Ledger ledger)
    : DeviceCommunicator(options, std::move(ledger)),
      staging_bytes_(options.max_size),
      graph_inputs_(options.rank, options.world, options.device) {
  SGL_CHECK(staging_bytes_ >= kMinSize && staging_bytes_ % kMinSize == 0, "init: got max_size ", staging_bytes_,
            "; expected a multiple of ", kMinSize, " bytes");
}

CommunicatorHandle PullCommunicator::publish() {
  const DeviceScope scope(device());
  const int64_t sums_bytes = staging_bytes_ / world() + device::kPackBytes;
  WorkspaceBytes bytes;
  bytes.zeros = device::kFlagBytes + staging_bytes_ + sums_bytes;
  return DeviceCommunicator::publish(Residency::load(pull_kernel_table(world())), bytes);
}

std::string PullCommunicator::attach(const std::vector<CommunicatorHandle>& handles) {
  const std::string reason = DeviceCommunicator::attach(handles);
  if (reason.empty()) graph_inputs_.attach(group(), kStagingOffset);
  return reason;
}

}  // namespace sgl_comm::cuda
