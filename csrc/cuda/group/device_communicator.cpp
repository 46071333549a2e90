#include "cuda/group/device_communicator.h"

#include <utility>

namespace sgl_comm::cuda {

DeviceCommunicator::DeviceCommunicator(const CommunicatorOptions& options, Ledger ledger)
    : group_(options.rank, options.world, options.device, options.timeout_seconds, options.first_epoch),
      thresholds_(options.thresholds),
      ledger_(std::move(ledger)) {}

CommunicatorHandle DeviceCommunicator::publish(const Residency& limits, WorkspaceBytes bytes) {
  CommunicatorHandle handle{};
  handle.residency = limits_ = limits;
  handle.thresholds = thresholds_;
  order_.prepare();
  handle.group = group_.publish(bytes);
  return handle;
}

std::string DeviceCommunicator::attach(const std::vector<CommunicatorHandle>& handles) {
  std::vector<DeviceHandle> groups;
  for (const CommunicatorHandle& handle : handles) {
    if (handle.failure[0] != 0) return "rank " + std::to_string(groups.size()) + ": " + handle.failure;
    if (!(handle.thresholds == thresholds_)) return "the ranks were given different thresholds (SGLCOMM_INVARIANT?)";
    groups.push_back(handle.group);
  }
  const std::string reason = group_.attach(groups);
  for (const CommunicatorHandle& handle : handles) limits_.lower_to(handle.residency);
  limits_.share(group_.most_on_a_device());
  return reason;
}

}  // namespace sgl_comm::cuda
