// Moving packs bit for bit, though one word, the sentinel, cannot be sent: a word that equals it is sent as another,
// and marks beside the data say which words those were. The 32 packs of a warp form a row, which two packs of marks
// follow, one for each half of the warp, with a word for each word of a pack and a bit for each thread. A half has 16
// threads, so no mark equals the sentinel.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/partition.cuh"

namespace sgl_comm::device {

constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

// The marks of this thread's half of the warp. Needs all threads of the warp.
__device__ __forceinline__ uint4 marks_of(uint4 pack) {
  const int shift = threadIdx.x % 32 / 16 * 16;
  const auto mark = [&](uint32_t word) { return __ballot_sync(kFullWarp, word == kSentinel) >> shift & 0xFFFFu; };
  return {mark(pack.x), mark(pack.y), mark(pack.z), mark(pack.w)};
}

// The pack as it was before without_sentinel() of pack.cuh.
__device__ __forceinline__ uint4 with_marked_sentinels(uint4 pack, uint4 marks) {
  const int bit = threadIdx.x % 16;
  const auto restored = [&](uint32_t word, uint32_t mark) { return (mark >> bit & 1) != 0 ? kSentinel : word; };
  return {restored(pack.x, marks.x), restored(pack.y, marks.y), restored(pack.z, marks.z), restored(pack.w, marks.w)};
}

// A warp's position in the launch, and this thread's in the warp. A warp takes rows as a thread takes packs.
struct Warp {
  GridPosition position;
  int lane;
  uint32_t marks;  // bytes from the row's start to this half's marks
};
__device__ __forceinline__ Warp warp_in_grid() {
  const GridPosition thread = grid_position();
  const int lane = threadIdx.x % 32;
  return {{thread.index / 32, thread.count / 32}, lane, static_cast<uint32_t>((kRowData + lane / 16) * kPackBytes)};
}

}  // namespace sgl_comm::device
