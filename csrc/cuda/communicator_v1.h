// Storage for the pull kernels: a workspace with flags, a staging place and a place for sums (device/pull.cuh), and the
// peers' inputs of captured calls (graph_inputs.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device/parameters.h"
#include "cuda/device_communicator.h"
#include "cuda/graph_inputs.h"

namespace sgl_comm::cuda {

class CommunicatorV1 : public DeviceCommunicator {
 public:
  static constexpr const char* kWhat = "the pull kernels do not serve";
  static constexpr int64_t kMinStagingBytes = 64 << 10;

  // staging_bytes: of the input that one launch reads; larger ones take several.
  CommunicatorV1(int rank, int world, int device, int64_t staging_bytes, Thresholds thresholds, double timeout_seconds,
                 uint64_t first_epoch, Ledger ledger);

  CommunicatorHandle publish();
  std::string attach(const std::vector<CommunicatorHandle>& handles);

  device::PullView view() const { return {group().view(), kStagingOffset, kStagingOffset + staging_bytes_}; }
  int64_t staging_bytes() const { return staging_bytes_; }
  GraphInputs& graph_inputs() { return graph_inputs_; }

 private:
  static constexpr int64_t kStagingOffset = device::kControlBytes + device::kFlagBytes;

  const int64_t staging_bytes_;
  GraphInputs graph_inputs_;
};

}  // namespace sgl_comm::cuda
