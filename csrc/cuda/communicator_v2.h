// Storage for the push kernels: a workspace of three banks a rank, and places for broadcasts (device/push.cuh and
// device/broadcast.cuh say who writes them when).
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device/parameters.h"
#include "cuda/device_communicator.h"

namespace sgl_comm::cuda {

class CommunicatorV2 : public DeviceCommunicator {
 public:
  static constexpr const char* kWhat = "the push kernels do not serve";
  static constexpr int64_t kMinSlotBytes = 64 << 10, kMaxSlotBytes = 256 << 20;

  // slot_bytes: of one peer in one bank. The workspace is 3 * (world - 1) * slot_bytes and 4.4 MiB, in blocks of 2 MiB.
  CommunicatorV2(int rank, int world, int device, int64_t slot_bytes, Thresholds thresholds, double timeout_seconds,
                 uint64_t first_epoch, Ledger ledger);

  CommunicatorHandle publish();
  std::string attach(const std::vector<CommunicatorHandle>& handles) { return DeviceCommunicator::attach(handles); }

  device::PushView view() const { return {group().view(), static_cast<uint32_t>(bank_bytes())}; }
  int64_t slot_bytes() const { return slot_bytes_; }
  int64_t bank_bytes() const { return (world() - 1) * slot_bytes_; }
  // The most blocks of a ring of which each needs so much of a slot.
  int64_t most_ring_blocks(int64_t block_bytes) const {
    return std::min<int64_t>(slot_bytes_ / block_bytes, device::kMostRingBlocks);
  }

 private:
  const int64_t slot_bytes_;
};

}  // namespace sgl_comm::cuda
