#include "check.h"
#include "cuda/communicator_v1.h"
#include "cuda/cuda_check.h"
#include "cuda/pull_kernels.h"

namespace sgl_comm::cuda {

CommunicatorV1::CommunicatorV1(int rank, int world, int device, int64_t staging_bytes, Thresholds thresholds,
                               double timeout_seconds, uint64_t first_epoch)
    : staging_bytes_(staging_bytes),
      thresholds_(thresholds),
      group_(rank, world, device, timeout_seconds, first_epoch),
      graph_inputs_(rank, world, device) {
  SGL_CHECK(staging_bytes >= kMinStagingBytes && staging_bytes % kMinStagingBytes == 0, "init: got max_size ",
            staging_bytes, "; expected a multiple of ", kMinStagingBytes, " bytes");
}

HandleV1 CommunicatorV1::publish() {
  HandleV1 handle{};
  const DeviceScope scope(group_.device());
  handle.residency = limits_ = load_pull_kernels(group_.world());
  handle.thresholds = thresholds_;
  order_.prepare();
  const int64_t sums_bytes = staging_bytes_ / group_.world() + device::kPackBytes;
  handle.group = group_.publish(device::kFlagBytes + staging_bytes_ + sums_bytes, 0);
  return handle;
}

std::string CommunicatorV1::attach(const std::vector<HandleV1>& handles) {
  std::vector<DeviceHandle> groups;
  for (const HandleV1& handle : handles) {
    if (handle.failure[0] != 0) return "rank " + std::to_string(groups.size()) + ": " + handle.failure;
    if (!(handle.thresholds == thresholds_)) return "the ranks were given different thresholds (SGL_COMM_INVARIANT?)";
    groups.push_back(handle.group);
  }
  const std::string reason = group_.attach(groups);
  for (const HandleV1& handle : handles) limits_.lower_to(handle.residency);
  limits_.share(group_.most_on_a_device());
  if (reason.empty()) graph_inputs_.attach(group_, kStagingOffset);
  return reason;
}

}  // namespace sgl_comm::cuda
