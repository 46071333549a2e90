#include "cuda/push_kernels.h"

namespace sgl_comm::cuda {

Residency load_push_kernels(int world) {
  Residency residency;
  const auto add = [&](Kind kind, PushKernel kernel) { residency.add(kind, reinterpret_cast<const void*>(kernel)); };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    residency.add(Kind::kStrided, reinterpret_cast<const void*>(strided_one_shot_kernel(dtype, world)));
    for (const bool whole : {true, false}) {
      for (const Rounds rounds : {Rounds::kOne, Rounds::kMany, Rounds::kRing}) {
        add(rounds == Rounds::kRing ? Kind::kRing : Kind::kOneShot, one_shot_kernel(dtype, world, whole, rounds));
      }
      for (const bool ring : {true, false}) {
        add(ring ? Kind::kRing : Kind::kTwoShot, two_shot_kernel(dtype, world, whole, ring));
        add(ring ? Kind::kRing : Kind::kTwoShot, reduce_scatter_kernel(dtype, world, whole, ring));
      }
    }
  }
  const auto add_rows = [&](DType dtype, FusedRows rows, int groups) {
    const auto kernel = reinterpret_cast<const void*>(all_reduce_layernorm_kernel(dtype, world, rows, groups));
    residency.add(kind_of(dtype, world, rows, groups), kernel, kMostClustered);
  };
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const FusedRows rows : {FusedRows::kOne, FusedRows::kMany, FusedRows::kManyTwoShot}) {
      for (const int groups : {1, kMostGroups}) add_rows(dtype, rows, groups);
    }
  }
  load_norm_kernels();
  for (const Unit unit : {Unit::kPacks, Unit::kBytePairs, Unit::kBytes}) {
    for (const bool ring : {true, false}) add(ring ? Kind::kRing : Kind::kGather, gather_kernel(unit, world, ring));
    residency.add(Kind::kBroadcast, reinterpret_cast<const void*>(broadcast_kernel(unit)));
  }
  for (const int64_t unit_bytes : {4, 2, 1}) {
    residency.add(Kind::kBroadcast, reinterpret_cast<const void*>(strided_broadcast_kernel(unit_bytes)));
  }
  return residency;
}

}  // namespace sgl_comm::cuda
