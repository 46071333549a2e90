// The push kernels by what the host knows at run time. Nothing of torch: the kernels' own files read this.
#pragma once

#include <cstdint>

#include "cuda/address.h"
#include "cuda/device/parameters.h"
#include "cuda/residency.h"
#include "dispatch.h"

namespace sgl_comm::cuda {

using PushKernel = void (*)(device::Message);

// What is moved bit for bit: packs where everything is aligned, else pairs of bytes or bytes.
enum class Unit { kPacks, kBytePairs, kBytes };
// For tensors of so many bytes; null is aligned to anything.
inline Unit unit_for(const void* in, const void* out, int64_t bytes) {
  const auto suits = [&](int64_t size) { return (address_of(in) | address_of(out) | bytes) % size == 0; };
  return suits(device::kPackBytes) ? Unit::kPacks : suits(2) ? Unit::kBytePairs : Unit::kBytes;
}
// What such a kernel counts: pairs of bytes, or bytes.
inline int64_t elements_of(Unit unit, int64_t bytes) { return unit == Unit::kBytes ? bytes : bytes / 2; }

// The same for tensors that are not row-major, in bytes: 4, 2 or 1, of which an element has one or more.
inline int64_t strided_unit_for(const void* in, const void* out, int64_t element_bytes) {
  const auto places = static_cast<int64_t>(address_of(in) | address_of(out) | element_bytes);
  return places % 4 == 0 ? 4 : places % 2 == 0 ? 2 : 1;
}

// How often a thread of a one-shot takes a pack: once, as often as it has to, or in tiles through a ring.
enum class Rounds { kOne, kMany, kRing };

// whole: the tensors are 16-byte aligned and a whole number of packs, shard by shard. ring: for any size. Ranks may
// differ in `whole`.
PushKernel one_shot_kernel(DType dtype, int world, bool whole, Rounds rounds);
// As Rounds::kMany, for tensors of any strides.
using StridedKernel = void (*)(device::WithStrides<device::Message>);
StridedKernel strided_one_shot_kernel(DType dtype, int world);
PushKernel two_shot_kernel(DType dtype, int world, bool whole, bool ring);
PushKernel reduce_scatter_kernel(DType dtype, int world, bool whole, bool ring);
PushKernel gather_kernel(Unit unit, int world, bool ring);
using BroadcastKernel = void (*)(device::BroadcastMessage);
BroadcastKernel broadcast_kernel(Unit unit);
using StridedBroadcastKernel = void (*)(device::WithStrides<device::BroadcastMessage>);
StridedBroadcastKernel strided_broadcast_kernel(int64_t unit_bytes);

// How many rows a block or cluster of a fused launch has: one, or several, one- or two-shot.
enum class FusedRows { kOne, kMany, kManyTwoShot };
// groups: how many groups of a row a thread has at most, 1 or kMostGroups: in one slot or, where it is kOne, in as
// many.
using LayerNormKernel = void (*)(device::LayerNormMessage);
constexpr int kMostGroups = 2;
constexpr unsigned kMostClustered = 4;  // blocks that share a row
LayerNormKernel all_reduce_layernorm_kernel(DType dtype, int world, FusedRows rows, int groups);
// What its blocks count as.
inline Kind kind_of(DType dtype, int world, FusedRows rows, int groups) {
  const int packs = groups * kGroup * static_cast<int>(size_of(dtype)) / device::kPackBytes;
  return device::row_blocks(packs, world, rows == FusedRows::kOne) == 1 ? Kind::kRows : Kind::kDenseRows;
}
// whole: every array is 16-byte aligned, and a row a whole number of packs of each.
using NormKernel = void (*)(device::NormMessage);
NormKernel norm_kernel(DType dtype, bool whole);

// Whether a launch leaves what it has read for the next one to empty: faster for what is small, which waits; large
// messages do better with fewer places in use (benchmarks/bench_all_reduce.py).
constexpr int64_t kMostBytesToDefer = 32 << 10;
static_assert(kMostBytesToDefer / device::kPackBytes * (device::kMaxRanks - 1) <= device::Baton::kMostPacks);
inline bool push_defers(int64_t bytes) { return bytes <= kMostBytesToDefer; }

// The threads of a block that were fastest, by the packs that a launch has to move (the same benchmark).
inline unsigned one_shot_threads(int world, int64_t packs) {
  const bool large = packs > 16 << 10;
  return world == 2 ? (large ? 256 : packs <= 64 ? 64 : 128) : (large ? 128 : 64);
}
inline unsigned two_shot_threads(int64_t packs) { return packs <= 16 << 10 ? 64 : device::kTwoShotThreads; }

// Loads the norm kernels, which wait for nobody.
void load_norm_kernels();

// Loads every kernel of this world on the current device, and counts how many blocks of each kind fit on it at once.
Residency load_push_kernels(int world);

}  // namespace sgl_comm::cuda
