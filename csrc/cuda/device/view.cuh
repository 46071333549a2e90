// What a kernel sees of a group: a plain struct of pointers, passed by value. Shared by host and device.
#pragma once

#include <cstdint>

namespace sgl_comm::device {

constexpr int kMaxRanks = 8;

// The first bytes of each rank's workspace. The first 16 are read at once, at the start of each launch.
//   started  the epoch, times kEpoch. Every block of a launch adds to it once, in all kEpoch, when all its threads have
//            read it: a block that has not yet read still finds the old epoch.
//   abort    0, or a packed AbortCode: the group has failed. Written by any rank's kernel, the first time for good.
//   last     of the last launch of an even, or odd, epoch: which bank it used, and how many packs at its start it left
//            full, which the next launch empties.
//   ended    the epoch that comes after the last launch whose last block has ended.
// All of it is written by the rank's own kernels, `abort` by the peers' too.
struct alignas(16) Control {
  unsigned long long started;
  uint32_t abort;
  uint16_t last[2];
  unsigned long long ended;
  uint32_t fault_claimed;  // by the first thread of this rank that reports the fault to the host
};
// The launch after takes the next of three banks; a new workspace is as if bank 2 had been used, and left empty. Packs
// are counted in fours: the last few of a bank are emptied though they are empty.
constexpr uint32_t kBanks = 3, kLastBank = kBanks - 1, kPacksPerCount = 4, kMostPacksToEmpty = 0x3fff * kPacksPerCount;
__host__ __device__ constexpr uint16_t packed_last(uint32_t bank, uint32_t packs) {
  return static_cast<uint16_t>((packs + kPacksPerCount - 1) / kPacksPerCount << 2 | bank);
}
constexpr unsigned long long kEpoch = 1 << 16;
constexpr int64_t kControlBytes = 4096;

// Why a group has failed: what rank `rank` saw, of rank `peer`.
struct AbortCode {
  enum Kind : uint32_t { kTimeout, kDied, kOverlap, kUnregistered };
  uint32_t rank, peer, kind;
  __host__ __device__ constexpr uint32_t packed() const { return 0x80000000u | kind << 16 | rank << 8 | peer; }
  static __host__ __device__ constexpr AbortCode unpacked(uint32_t word) {
    return {word >> 8 & 0xff, word & 0xff, word >> 16 & 0xff};
  }
};

// What a launch is, for the words of an error.
enum Op : uint32_t { kAllReduce, kReduceScatter, kAllGather, kCustomAllReduceV1 };

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
  uint8_t* workspace[kMaxRanks];  // every rank's, as mapped here: its Control, then what its communicator keeps there
  Fault* fault;
  const HostAbort* host_abort;
  uint32_t timeout_ticks;  // of 2^20 ns
  int rank;
};

}  // namespace sgl_comm::device
