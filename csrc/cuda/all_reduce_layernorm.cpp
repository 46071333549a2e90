// tp_attn_all_reduce_and_layernorm between GPUs: in one launch where the push kernels serve the message at once, else
// the all-reduce and then the norm. Which of the two depends on what all ranks share alone.
#include "all_reduce_layernorm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/all_reduce.h"
#include "cuda/group/groups.h"
#include "cuda/kernels/push_kernels.h"
#include "cuda/launch.h"
#include "policy.h"
#include "text.h"

namespace sgl_comm::cuda {

namespace {

constexpr const char* kOp = kAllReduceLayerNorm;

constexpr int64_t kMostClusteredRows = 8, kMostClusteredRowsAlone = 32;  // the latter where no ranks share a device
constexpr int kFewestThreads = 128;                                      // of a clustered block

// The tensor itself where it is 16-byte aligned, else an aligned copy.
Tensor aligned_or_copy(const Tensor& tensor) {
  return is_aligned(tensor.const_data_ptr(), device::kPackBytes) ? tensor : fresh_row_major(kOp, tensor);
}

device::Weights weights_of(const std::optional<Tensor>& tensor) {
  if (!tensor.has_value()) return {nullptr, false};
  return {tensor->const_data_ptr(), dtype_of(tensor->scalar_type()) == DType::kFloat32};
}

int64_t bytes_of(const LayerNormCall& call) {
  return call.rows * call.hidden * static_cast<int64_t>(size_of(call.dtype));
}

// How a fused launch goes. What was fastest (benchmarks/bench_all_reduce_layernorm.py): few rows are a cluster's each.
struct Plan {
  FusedRows rows;
  int vectors;
  Shape shape;
  bool early;  // may begin before the launch before it has ended
  bool late;   // lets the next one begin only at its end
};
Plan plan_for(const PushCommunicator& comm, const LayerNormCall& call, bool two_shot) {
  const Residency& limits = comm.limits();
  const int sharing = limits.ranks, partials = row_partials(call.hidden);
  const int vectors = row_vectors(call.hidden) > partials ? kMostVectors : 1;
  // Full trees; some partial sums may have no vector.
  const auto threads_of = [&](int parts) {
    return static_cast<unsigned>((partials / parts + kTree - 1) / kTree * kTree);
  };
  const auto most_rows = [&](FusedRows rows, int of_vectors, unsigned threads, unsigned cluster, bool late) {
    const KernelKind kind = kind_of(call.dtype, comm.world(), rows, of_vectors);
    return std::max<int64_t>(1, limits.most_blocks(kind, threads, cluster, late) / cluster);
  };
  // Where ranks share a device, what small blocks of one launch leave of its processors may be too little for a large
  // block of another, which then seems to hold up later launches, also those that the first waits for. With two ranks
  // only blocks that fill a processor are too large, with more any may be.
  const auto apart = [&](FusedRows rows, int of_vectors, unsigned threads) {
    const bool fills = threads > 256 && kind_of(call.dtype, comm.world(), rows, of_vectors) == KernelKind::kRows;
    return sharing > 2 || (sharing == 2 && fills);
  };

  unsigned cluster = partials > device::kMaxThreads ? 2 : 1;
  const bool few = call.rows <= kMostClusteredRows;
  if (limits.dependent_launch && (few || (sharing == 1 && !two_shot && vectors == 1))) {
    const auto divides = [&](unsigned blocks) {
      return blocks <= kMostClustered && partials / blocks >= kFewestThreads && partials % (blocks * kTree) == 0;
    };
    const auto fit = [&](unsigned blocks) {
      return call.rows <= kMostClusteredRowsAlone &&
             call.rows <= most_rows(FusedRows::kOne, vectors, threads_of(blocks), blocks, false);
    };
    while (divides(2 * cluster) && (few || fit(2 * cluster))) cluster *= 2;
  }
  const unsigned threads = threads_of(cluster);
  const auto with = [&](FusedRows rows, int64_t at_once, bool late) {
    const Shape shape{Residency::evenly(call.rows, at_once) * cluster, threads, cluster};
    const bool keeps_apart = apart(rows, vectors, threads);
    return Plan{rows, vectors, shape, !keeps_apart, late || keeps_apart};
  };
  if (!two_shot && vectors == 1) {
    constexpr FusedRows kOne = FusedRows::kOne;
    if (call.rows <= most_rows(kOne, 1, threads, cluster, false)) return with(kOne, call.rows, false);
    // With two partial sums a thread, one block does what would take a cluster.
    const unsigned half = threads_of(kMostVectors);
    if (partials > device::kMaxThreads && call.rows <= most_rows(kOne, kMostVectors, half, 1, false) &&
        !apart(kOne, kMostVectors, half)) {
      return Plan{kOne, kMostVectors, Shape{static_cast<unsigned>(call.rows), half}, true, false};
    }
  }
  const FusedRows rows = two_shot ? FusedRows::kManyTwoShot : FusedRows::kMany;
  const int64_t early = most_rows(rows, vectors, threads, cluster, false);
  const int64_t late = most_rows(rows, vectors, threads, cluster, true);
  const auto rounds = [&](int64_t at_once) { return (call.rows + at_once - 1) / at_once; };
  return sharing <= 2 && rounds(late) < rounds(early) ? with(rows, late, true) : with(rows, early, false);
}

// The algorithm of a fused launch, or a ring, for which there is none.
Algorithm algorithm_for(const PushCommunicator& comm, const LayerNormCall& call) {
  const int64_t bytes = bytes_of(call);
  const bool clusters = comm.limits().dependent_launch;
  const int most_partials = clusters ? kMostPartials : device::kMaxThreads;
  const bool fits_threads = row_partials(call.hidden) <= most_partials &&
                            row_vectors(call.hidden) <= int64_t{kMostVectors} * row_partials(call.hidden);
  if (call.hidden % kVector != 0 || !fits_threads || bytes > comm.thresholds().fallback_bytes) {
    return Algorithm::kOneShotRing;
  }
  return choose(kOp, "auto", bytes, comm.world(), comm.buffer_bytes(), comm.thresholds());
}

void fused(PushCommunicator& comm, const LayerNormCall& call, Algorithm algorithm, Tensor& normed,
           Tensor& new_residual) {
  check_usable(kOp, comm, call.hidden_states);
  const Tensor in = aligned_or_copy(call.hidden_states), residual = aligned_or_copy(call.residual);
  const Tensor weight = aligned_or_copy(call.weight);
  const std::optional<Tensor> bias = call.bias.has_value() ? std::optional(aligned_or_copy(*call.bias)) : std::nullopt;
  const bool two_shot = algorithm == Algorithm::kTwoShot;
  const int64_t bytes = bytes_of(call);
  const Plan plan = plan_for(comm, call, two_shot);
  device::AllReduceLayerNormParameters parameters{};
  parameters.view = comm.view();
  parameters.in = in.const_data_ptr();
  parameters.residual = residual.const_data_ptr();
  parameters.weight = weights_of(weight);
  parameters.bias = weights_of(bias);
  parameters.normed = normed.mutable_data_ptr();
  parameters.new_residual = new_residual.mutable_data_ptr();
  parameters.rows = static_cast<int>(call.rows);
  parameters.hidden = static_cast<int>(call.hidden);
  parameters.shard_packs = static_cast<int>(shard_packs_of(bytes, comm.world()));
  parameters.length = row_length(call.hidden);
  parameters.norm = call.norm;
  parameters.defer = push_defers(bytes);
  parameters.late = plan.late;
  launch_in_order(kOp, comm, all_reduce_layernorm_kernel(call.dtype, comm.world(), plan.rows, plan.vectors), plan.shape,
                  parameters, plan.early);
}

void normalise(const LayerNormCall& call, const Tensor& sums, Tensor& normed, Tensor& new_residual) {
  device::NormParameters parameters{};
  parameters.sums = sums.const_data_ptr();
  parameters.residual = call.residual.const_data_ptr();
  parameters.weight = weights_of(call.weight);
  parameters.bias = weights_of(call.bias);
  parameters.normed = normed.mutable_data_ptr();
  parameters.new_residual = new_residual.mutable_data_ptr();
  parameters.hidden = call.hidden;
  parameters.length = row_length(call.hidden);
  parameters.norm = call.norm;
  bool aligned = call.hidden % kVector == 0;
  for (const void* p : {parameters.sums, parameters.residual, parameters.weight.data, parameters.bias.data}) {
    aligned = aligned && is_aligned(p, device::kPackBytes);
  }
  const int device = normed.get_device_index();
  const DeviceScope scope(device);
  launch(kOp, norm_kernel(call.dtype, aligned),
         Shape{static_cast<unsigned>(call.rows), static_cast<unsigned>(row_partials(call.hidden))},
         current_stream(device), false, parameters);
}

std::tuple<Tensor, Tensor> all_reduce_layernorm(const Tensor& hidden_states, const Tensor& residual,
                                                const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                                                const Text& norm, double weight_offset, const Text& group_name) {
  const LayerNormCall call = check_layernorm(hidden_states, residual, weight, bias, eps, norm, weight_offset);
  const auto group = groups().find(kOp, group_name);
  PushCommunicator* const comm = group->push.serving();
  Tensor new_residual = empty_row_major(kOp, hidden_states);
  if (group->world > 1 && comm != nullptr && call.rows > 0) {
    const Algorithm algorithm = algorithm_for(*comm, call);
    if (algorithm == Algorithm::kOneShot || algorithm == Algorithm::kTwoShot) {
      Tensor normed = empty_row_major(kOp, hidden_states);
      fused(*comm, call, algorithm, normed, new_residual);
      return {normed, new_residual};
    }
  }
  const bool alone = group->world == 1;
  const Tensor sums = alone ? call.hidden_states : sum_over_ranks(kOp, *group, call.hidden_states);
  Tensor normed = alone ? empty_row_major(kOp, hidden_states) : sums;
  if (call.rows > 0) normalise(call, sums, normed, new_residual);
  return {normed, new_residual};
}

}  // namespace

}  // namespace sgl_comm::cuda

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CUDA, m) {
  m.impl("tp_attn_all_reduce_and_layernorm", TORCH_BOX(&sgl_comm::cuda::all_reduce_layernorm));
}
