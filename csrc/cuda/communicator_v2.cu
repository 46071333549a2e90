#include "check.h"
#include "cuda/communicator_v2.h"
#include "cuda/cuda_check.h"
#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

CommunicatorV2::CommunicatorV2(int rank, int world, int device, int64_t slot_bytes, Thresholds thresholds,
                               double timeout_seconds, uint64_t first_epoch)
    : group_(rank, world, device, timeout_seconds, first_epoch), slot_bytes_(slot_bytes), thresholds_(thresholds) {
  SGL_CHECK(slot_bytes >= kMinSlotBytes && slot_bytes <= kMaxSlotBytes && slot_bytes % kMinSlotBytes == 0,
            "init: got max_size ", slot_bytes, "; expected a multiple of ", kMinSlotBytes, " bytes up to ",
            kMaxSlotBytes);
}

HandleV2 CommunicatorV2::publish() {
  HandleV2 handle{};
  const DeviceScope scope(group_.device());
  handle.residency = limits_ = load_push_kernels(group_.world());
  handle.thresholds = thresholds_;
  order_.prepare();
  handle.group = group_.publish(device::kBanks * bank_bytes(), 0xff);
  return handle;
}

std::string CommunicatorV2::attach(const std::vector<HandleV2>& handles) {
  std::vector<DeviceHandle> groups;
  for (const HandleV2& handle : handles) {
    if (handle.failure[0] != 0) return "rank " + std::to_string(groups.size()) + ": " + handle.failure;
    if (!(handle.thresholds == thresholds_)) return "the ranks were given different thresholds (SGL_COMM_INVARIANT?)";
    groups.push_back(handle.group);
  }
  const std::string reason = group_.attach(groups);
  for (const HandleV2& handle : handles) limits_.lower_to(handle.residency);
  limits_.share(group_.most_on_a_device());
  return reason;
}

}  // namespace sgl_comm::cuda
