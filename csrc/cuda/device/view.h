// What a kernel sees of a group: a plain struct of pointers, passed by value. Shared by host and device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "dispatch.h"
#include "ops.h"

namespace sgl_comm::device {

constexpr unsigned long long kEpoch = 1 << 16;  // of Control::started, the unit in which epochs are counted

// The first bytes of each rank's workspace, of which a launch reads 16 at its start.
//   started       the epoch, times kEpoch. Every block of a launch adds to it once, in all kEpoch, when all its
//                 threads have read it: a block that has not yet read still finds the old epoch.
//   abort         0, or a packed AbortCode: the group has failed. Written by any rank's kernel; the first one stays.
//   buffer_state  a packed BufferState, written at the end of each launch by the block whose addition made up its
//                 kEpoch.
// All of it is written by the rank's own kernels, `abort` by the peers' too.
struct alignas(16) Control {
  unsigned long long started;
  uint32_t abort;
  uint32_t buffer_state;
  uint32_t fault_claimed;  // by the first thread of this rank that reports the fault to the host
};

// What a launch leaves to the next one: which of the three buffers the next one uses, which buffer this one has used,
// how many packs at the start of that buffer it has left full for the next one to empty, and which epoch has ended.
struct BufferState {
  static constexpr uint32_t kBufferBits = 2, kCountBits = 14, kEpochBits = 32 - 2 * kBufferBits - kCountBits;
  static constexpr uint32_t kPacksPerCount = 4;  // the last few of a buffer are emptied though they are empty
  static constexpr uint32_t kMostPacks = ((1u << kCountBits) - 1) * kPacksPerCount;

  uint32_t buffer;
  uint32_t previous_buffer;
  uint32_t packs_to_empty;
  uint32_t epoch;  // the last bits of the epoch of the launch that reads this

  __host__ __device__ constexpr uint32_t packed() const {
    const uint32_t count = (packs_to_empty + kPacksPerCount - 1) / kPacksPerCount;
    return epoch << (2 * kBufferBits + kCountBits) | count << (2 * kBufferBits) | previous_buffer << kBufferBits |
           buffer;
  }
  static __host__ __device__ constexpr BufferState unpacked(uint32_t word) {
    constexpr uint32_t kBuffer = (1u << kBufferBits) - 1, kCount = (1u << kCountBits) - 1;
    return {word & kBuffer, word >> kBufferBits & kBuffer, (word >> (2 * kBufferBits) & kCount) * kPacksPerCount,
            word >> (2 * kBufferBits + kCountBits)};
  }
  // For the launch after one that had this state and leaves `packs` packs full. push.cuh says why these buffers.
  __host__ __device__ constexpr BufferState next(uint32_t packs) const {
    const uint32_t third = 3 - buffer - previous_buffer;
    return {packs_to_empty == 0 ? previous_buffer : third, buffer, packs, last_bits(epoch + 1)};
  }
  // For the launch after one that had this state and has not touched the buffers.
  __host__ __device__ constexpr BufferState unchanged() const {
    return {buffer, previous_buffer, packs_to_empty, last_bits(epoch + 1)};
  }
  static __host__ __device__ constexpr uint32_t last_bits(uint64_t epoch) {
    return static_cast<uint32_t>(epoch) & ((1u << kEpochBits) - 1);
  }
};
constexpr uint32_t kBuffers = 3;
__host__ __device__ constexpr BufferState first_buffer_state(uint64_t epoch) {
  return {0, 1, 0, BufferState::last_bits(epoch)};
}
constexpr int64_t kControlBytes = 4096;

// Why a group has failed: what rank `rank` saw, of rank `peer`.
struct AbortCode {
  enum Kind : uint32_t { kTimeout, kDied, kOverlap, kUnregistered, kRefused };
  uint32_t rank, peer, kind;
  __host__ __device__ constexpr uint32_t packed() const { return 0x80000000u | kind << 16 | rank << 8 | peer; }
  static __host__ __device__ constexpr AbortCode unpacked(uint32_t word) {
    return {word >> 8 & 0xff, word & 0xff, word >> 16 & 0xff};
  }
};

// In host memory, written by the GPU once: what this rank's host reads of a failure.
struct Fault {
  uint32_t written;
  uint32_t abort;
  uint32_t op;  // an Op
  uint32_t block;
  unsigned long long epoch;
};

// In host memory, written by the host: a packed AbortCode when a peer's process has died, or the ranks have not refused
// the same calls; else 0.
struct HostAbort {
  uint32_t abort;
};

struct GroupView {
  uint8_t* workspace[kMaxWorld];  // every rank's, as mapped here: its Control, then what its communicator keeps there
  Fault* fault;
  const HostAbort* host_abort;
  uint32_t timeout_ticks;  // of 2^20 ns
  int rank;
};

}  // namespace sgl_comm::device
