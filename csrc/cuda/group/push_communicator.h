// Storage for the push kernels: a workspace of three buffers a rank, and slots for broadcasts (device/push.cuh and
// kernels/broadcast.cu say who writes them when).
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device/parameters.h"
#include "cuda/group/device_communicator.h"

namespace sgl_comm::cuda {

class PushCommunicator : public DeviceCommunicator {
 public:
  static constexpr int64_t kMinSize = 64 << 10, kMaxSize = 256 << 20;

  // options.max_size is what one sender has of a buffer, in bytes. The workspace is 3 * (world - 1) * max_size and 4.4
  // MiB, in blocks of 2 MiB.
  PushCommunicator(const CommunicatorOptions& options, Ledger ledger);

  CommunicatorHandle publish();
  std::string attach(const std::vector<CommunicatorHandle>& handles) { return DeviceCommunicator::attach(handles); }

  device::PushView view() const {
    device::PushView view{};
    view.group = group().view();
    view.buffer_bytes = static_cast<uint32_t>(buffer_bytes());
    return view;
  }
  int64_t sender_bytes() const { return sender_bytes_; }
  int64_t buffer_bytes() const { return (world() - 1) * sender_bytes_; }
  // The most blocks of a ring if each needs so many bytes of each sender's part.
  int64_t most_ring_blocks(int64_t block_bytes) const {
    return std::min<int64_t>(sender_bytes_ / block_bytes, device::kMostRingBlocks);
  }

 private:
  const int64_t sender_bytes_;
};

}  // namespace sgl_comm::cuda
