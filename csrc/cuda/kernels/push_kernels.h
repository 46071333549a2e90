// The push kernels and the norm kernels by what the host knows at run time. Nothing of torch: the kernels' own files
// read this.
#pragma once

#include <cstdint>

#include "cuda/address.h"
#include "cuda/device/parameters.h"
#include "cuda/kernels/residency.h"
#include "dispatch.h"

namespace sgl_comm::device {

// Launch parameters of a broadcast.
struct BroadcastParameters {
  PushView view;
  const void* in;    // on the source alone
  void* out;         // null on a source whose result is `in`
  int64_t count;     // elements
  int64_t num_rows;  // of kRowData packs
  int source, world;
};

// Launch parameters of the fused all-reduce and norm. Rows have `hidden` elements, a multiple of kVector; every array
// is 16-byte aligned.
struct AllReduceLayerNormParameters {
  PushView view;
  const void* in;
  const void* residual;
  Weights weight, bias;
  void* normed;
  void* new_residual;
  int rows, hidden;
  int shard_packs;  // two-shot: packs of the message that are each rank's to sum
  RowLength length;
  Norm norm;
  bool defer;  // leave the buffer full for the next launch to empty
  bool late;   // the next launch may begin only when this one is nearly done, so that it may itself have more blocks
};

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

using PushKernel = void (*)(device::PushParameters);

// What is moved bit for bit: packs where everything is aligned, else pairs of bytes or bytes.
enum class Unit { kPacks, kBytePairs, kBytes };
constexpr Unit kUnits[] = {Unit::kPacks, Unit::kBytePairs, Unit::kBytes};
// The unit for tensors of so many bytes; a null pointer is aligned to anything.
inline Unit unit_for(const void* in, const void* out, int64_t bytes) {
  const auto suits = [&](int64_t size) { return (address_of(in) | address_of(out) | bytes) % size == 0; };
  return suits(device::kPackBytes) ? Unit::kPacks : suits(2) ? Unit::kBytePairs : Unit::kBytes;
}
// How many elements a kernel for that unit counts in so many bytes: pairs of bytes, or bytes.
inline int64_t elements_of(Unit unit, int64_t bytes) { return unit == Unit::kBytes ? bytes : bytes / 2; }

// The unit for tensors that are not row-major, in bytes; an element has one unit or more.
constexpr int64_t kStridedUnits[] = {4, 2, 1};
inline int64_t strided_unit_for(const void* in, const void* out, int64_t element_bytes) {
  const auto divisors = static_cast<int64_t>(address_of(in) | address_of(out) | element_bytes);
  return divisors % 4 == 0 ? 4 : divisors % 2 == 0 ? 2 : 1;
}

// How often a thread of a one-shot takes a pack: once, as often as it has to, or in tiles through a ring.
enum class Rounds { kOne, kMany, kRing };
constexpr Rounds kAllRounds[] = {Rounds::kOne, Rounds::kMany, Rounds::kRing};

// aligned: the tensors are 16-byte aligned and a whole number of packs, shard by shard; ranks may differ in it. ring:
// for messages of any size.
PushKernel one_shot_kernel(DType dtype, int world, bool aligned, Rounds rounds);
PushKernel two_shot_kernel(DType dtype, int world, bool aligned, bool ring);
PushKernel reduce_scatter_kernel(DType dtype, int world, bool aligned, bool ring);
PushKernel gather_kernel(Unit unit, int world, bool ring);
using BroadcastKernel = void (*)(device::BroadcastParameters);
BroadcastKernel broadcast_kernel(Unit unit);

// For tensors of any strides; a one-shot takes as many rounds as it has to.
using StridedKernel = void (*)(device::WithStrides<device::PushParameters>);
StridedKernel strided_one_shot_kernel(DType dtype, int world);
using StridedBroadcastKernel = void (*)(device::WithStrides<device::BroadcastParameters>);
StridedBroadcastKernel strided_broadcast_kernel(int64_t unit_bytes);

// How many rows a block or cluster of a fused launch has: one, or several, one- or two-shot.
enum class FusedRows { kOne, kMany, kManyTwoShot };
constexpr FusedRows kAllFusedRows[] = {FusedRows::kOne, FusedRows::kMany, FusedRows::kManyTwoShot};
// vectors: how many vectors of a row a thread has at most, 1 or kMostVectors: in one partial sum or, with
// FusedRows::kOne, in one each.
using LayerNormKernel = void (*)(device::AllReduceLayerNormParameters);
constexpr int kMostVectors = 2;
constexpr unsigned kMostClustered = 4;  // the most blocks that share a row
LayerNormKernel all_reduce_layernorm_kernel(DType dtype, int world, FusedRows rows, int vectors);
// What its blocks count as.
inline KernelKind kind_of(DType dtype, int world, FusedRows rows, int vectors) {
  const int packs = vectors * kVector * static_cast<int>(size_of(dtype)) / device::kPackBytes;
  const bool dense = device::row_blocks(packs, world, rows == FusedRows::kOne) > 1;
  return dense ? KernelKind::kDenseRows : KernelKind::kRows;
}

// aligned: every array is 16-byte aligned, and a row a whole number of packs of each.
using NormKernel = void (*)(device::NormParameters);
NormKernel norm_kernel(DType dtype, bool aligned);

// Whether a launch leaves the slots that it has read for the next one to empty: faster for small messages, where the
// next launch waits anyway; large ones do better with fewer buffers in use (benchmarks/bench_all_reduce.py).
constexpr int64_t kMostBytesToDefer = 32 << 10;
static_assert(kMostBytesToDefer / device::kPackBytes * (kMaxWorld - 1) <= device::BufferState::kMostPacks);
inline bool push_defers(int64_t bytes) { return bytes <= kMostBytesToDefer; }

// The threads of a block that were fastest, by the packs that a launch has to move (the same benchmark).
inline unsigned one_shot_threads(int world, int64_t packs) {
  const bool large = packs > 16 << 10;
  return world == 2 ? (large ? 256 : packs <= 64 ? 64 : 128) : (large ? 128 : 64);
}
inline unsigned two_shot_threads(int64_t packs) { return packs <= 16 << 10 ? 64 : device::kTwoShotThreads; }

// The norm kernels, which the groups of both protocols launch.
inline KernelTable norm_kernel_table() {
  KernelTable table;
  for (const DType dtype : kSummedDTypes) {
    for (const bool aligned : {true, false}) table.add(KernelKind::kWaitsForNobody, norm_kernel(dtype, aligned));
  }
  return table;
}

// Every kernel that a group of so many ranks may launch, to be loaded at init: a kernel that is missing here would be
// loaded by its first launch, which a kernel that waits for its peers can block.
inline KernelTable push_kernel_table(int world) {
  KernelTable table = norm_kernel_table();
  const auto kind = [](bool ring, KernelKind plain) { return ring ? KernelKind::kRing : plain; };
  for (const DType dtype : kSummedDTypes) {
    table.add(KernelKind::kStrided, strided_one_shot_kernel(dtype, world));
    for (const bool aligned : {true, false}) {
      for (const Rounds rounds : kAllRounds) {
        table.add(kind(rounds == Rounds::kRing, KernelKind::kOneShot), one_shot_kernel(dtype, world, aligned, rounds));
      }
      for (const bool ring : {true, false}) {
        table.add(kind(ring, KernelKind::kTwoShot), two_shot_kernel(dtype, world, aligned, ring));
        table.add(kind(ring, KernelKind::kTwoShot), reduce_scatter_kernel(dtype, world, aligned, ring));
      }
    }
    for (const FusedRows rows : kAllFusedRows) {
      for (const int vectors : {1, kMostVectors}) {
        table.add(kind_of(dtype, world, rows, vectors), all_reduce_layernorm_kernel(dtype, world, rows, vectors),
                  kMostClustered);
      }
    }
  }
  for (const Unit unit : kUnits) {
    for (const bool ring : {true, false}) table.add(kind(ring, KernelKind::kGather), gather_kernel(unit, world, ring));
    table.add(KernelKind::kBroadcast, broadcast_kernel(unit));
  }
  for (const int64_t unit_bytes : kStridedUnits)
    table.add(KernelKind::kBroadcast, strided_broadcast_kernel(unit_bytes));
  return table;
}

}  // namespace sgl_comm::cuda
