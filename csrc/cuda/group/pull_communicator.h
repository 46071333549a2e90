// Storage for the pull kernels: a workspace with flags, a staging area and an area for sums (kernels/pull.cu), and the
// peers' inputs of captured calls (graph_inputs.h).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device/parameters.h"
#include "cuda/group/device_communicator.h"
#include "cuda/group/graph_inputs.h"

namespace sgl_comm::cuda {

class PullCommunicator : public DeviceCommunicator {
 public:
  static constexpr int64_t kMinSize = 64 << 10;

  // options.max_size is the size of the staging area, in bytes: the input of one launch; larger ones take several.
  PullCommunicator(const CommunicatorOptions& options, Ledger ledger);

  CommunicatorHandle publish();
  std::string attach(const std::vector<CommunicatorHandle>& handles);

  device::PullView view() const {
    device::PullView view{};
    view.group = group().view();
    view.staging = kStagingOffset;
    view.sums = kStagingOffset + staging_bytes_;
    return view;
  }
  int64_t staging_bytes() const { return staging_bytes_; }
  GraphInputs& graph_inputs() { return graph_inputs_; }

 private:
  static constexpr int64_t kStagingOffset = device::kControlBytes + device::kFlagBytes;

  const int64_t staging_bytes_;
  GraphInputs graph_inputs_;
};

}  // namespace sgl_comm::cuda
