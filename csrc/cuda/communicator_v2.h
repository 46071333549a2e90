// Storage for the push kernels: a workspace of three banks a rank (device/push.cuh says who writes them when).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device/message.cuh"
#include "cuda/device_group.h"
#include "cuda/residency.h"
#include "cuda/stream_order.h"
#include "policy.h"

namespace sgl_comm::cuda {

// What a rank tells the others at init, as bytes over their own group.
struct HandleV2 {
  DeviceHandle group;
  Residency residency;
  Thresholds thresholds;
  char failure[160];  // why this rank could not make its part; empty if it could
};

class CommunicatorV2 {
 public:
  static constexpr const char* kWhat = "the push kernels do not serve";
  static constexpr int64_t kMinSlotBytes = 64 << 10, kMaxSlotBytes = 256 << 20;

  // slot_bytes: of one peer in one bank. The workspace is 3 * (world - 1) * slot_bytes and a Control, in blocks of 2
  // MiB.
  CommunicatorV2(int rank, int world, int device, int64_t slot_bytes, Thresholds thresholds, double timeout_seconds,
                 uint64_t first_epoch);

  // Set-up, in this order on every rank; between the two the handles go round the group.
  HandleV2 publish();
  std::string attach(const std::vector<HandleV2>& handles);  // empty, or why this rank cannot
  void settle() { group_.settle(); }

  int rank() const { return group_.rank(); }
  int world() const { return group_.world(); }
  int device() const { return group_.device(); }
  bool failed() const { return group_.failed(); }
  std::string fault() const { return group_.fault(); }

  device::PushView view() const { return {group_.view(), static_cast<uint32_t>(bank_bytes())}; }
  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t bank_bytes() const { return (world() - 1) * slot_bytes_; }
  const Thresholds& thresholds() const { return thresholds_; }
  const Residency& limits() const { return limits_; }
  StreamOrder& order() { return order_; }

 private:
  DeviceGroup group_;
  const int64_t slot_bytes_;
  const Thresholds thresholds_;
  Residency limits_;
  StreamOrder order_;
};

}  // namespace sgl_comm::cuda
