// What a kernel sees of a group: a plain struct of pointers, passed by value. Shared by host and device.
#pragma once

#include <cstdint>

namespace sgl_comm::device {

constexpr int kMaxRanks = 8;

// The first bytes of each rank's workspace. Zero at the start.
//   counter  the epoch, times kEpoch. Written by the rank's own kernels alone: every block adds to it once, in all
//            kEpoch a launch, so that a block which has not yet left still reads the old epoch.
//   abort    0, or a packed AbortCode: the group has failed. Written by any rank's kernel, the first time for good.
// Both are read together at the start of each kernel.
struct Control {
  unsigned long long counter;
  uint32_t abort;
  uint32_t fault_claimed;  // by the first thread of this rank that reports the fault to the host
};
constexpr unsigned long long kEpoch = 1 << 16;
constexpr int64_t kControlBytes = 4096;

// Which rank gave up, and on whom.
struct AbortCode {
  uint32_t rank, peer, died;
  __host__ __device__ constexpr uint32_t packed() const { return 0x80000000u | died << 16 | rank << 8 | peer; }
  static __host__ __device__ constexpr AbortCode unpacked(uint32_t word) {
    return {word >> 8 & 0xff, word & 0xff, word >> 16 & 1};
  }
};

// In host memory, written by the GPU once: what this rank's host reads of a failure.
struct Fault {
  uint32_t written;
  uint32_t abort;
  uint32_t op;
  uint32_t block;
  unsigned long long epoch;
};

// In host memory, written by the host's watcher: a packed AbortCode when a peer's process has died, else 0.
struct HostAbort {
  uint32_t abort;
};

struct GroupView {
  uint8_t* workspace[kMaxRanks];  // every rank's, as mapped here
  Fault* fault;
  const HostAbort* host_abort;
  int64_t slot_bytes;      // of one sender, in one half
  uint32_t timeout_ticks;  // of 2^20 ns
  int rank;
};

// Workspace of a rank: control, then two halves (epochs alternate), each with a slot a sender.
__host__ __device__ inline uint8_t* slot(uint8_t* workspace, int64_t slot_bytes, int world, unsigned long long epoch,
                                         int sender) {
  return workspace + kControlBytes + ((epoch & 1) * world + sender) * slot_bytes;
}

}  // namespace sgl_comm::device
