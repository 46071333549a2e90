// Storage for the pull kernels: a workspace with flags, a staging place and a place for sums (device/pull.cuh), and the
// peers' inputs of captured calls (graph_inputs.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device/pull.cuh"
#include "cuda/device_group.h"
#include "cuda/graph_inputs.h"
#include "cuda/residency.h"
#include "cuda/stream_order.h"
#include "policy.h"

namespace sgl_comm::cuda {

// What a rank tells the others at init, as bytes over their own group.
struct HandleV1 {
  DeviceHandle group;
  Residency residency;
  Thresholds thresholds;
  char failure[160];  // why this rank could not make its part; empty if it could
};

class CommunicatorV1 {
 public:
  static constexpr const char* kWhat = "the pull kernels do not serve";
  static constexpr int64_t kMinStagingBytes = 64 << 10;

  // staging_bytes: of the input that one launch reads; larger ones take several.
  CommunicatorV1(int rank, int world, int device, int64_t staging_bytes, Thresholds thresholds, double timeout_seconds,
                 uint64_t first_epoch);

  // Set-up, in this order on every rank; between the two the handles go round the group.
  HandleV1 publish();
  std::string attach(const std::vector<HandleV1>& handles);  // empty, or why this rank cannot
  void settle() { group_.settle(); }

  int rank() const { return group_.rank(); }
  int world() const { return group_.world(); }
  int device() const { return group_.device(); }
  bool failed() const { return group_.failed(); }
  std::string fault() const { return group_.fault(); }

  device::PullView view() const { return {group_.view(), kStagingOffset, kStagingOffset + staging_bytes_}; }
  int64_t staging_bytes() const { return staging_bytes_; }
  const Thresholds& thresholds() const { return thresholds_; }
  const Residency& limits() const { return limits_; }
  StreamOrder& order() { return order_; }
  GraphInputs& graph_inputs() { return graph_inputs_; }

 private:
  static constexpr int64_t kStagingOffset = device::kControlBytes + device::kFlagBytes;

  const int64_t staging_bytes_;
  const Thresholds thresholds_;
  DeviceGroup group_;
  GraphInputs graph_inputs_;  // after group_: its mappings are closed before
  Residency limits_;
  StreamOrder order_;
};

}  // namespace sgl_comm::cuda
