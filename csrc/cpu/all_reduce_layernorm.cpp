// tp_attn_all_reduce_and_layernorm between the processes of one host: the all-reduce, then the norm row by row.
#include "all_reduce_layernorm.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/all_reduce.h"
#include "cpu/row_norm.h"
#include "text.h"

namespace sgl_comm::cpu {

namespace {

std::tuple<Tensor, Tensor> all_reduce_layernorm(const Tensor& hidden_states, const Tensor& residual,
                                                const Tensor& weight, const std::optional<Tensor>& bias, double eps,
                                                const Text& norm, double weight_offset, const Text& group_name) {
  const LayerNormCall call = check_layernorm(hidden_states, residual, weight, bias, eps, norm, weight_offset);
  SGL_CHECK(hidden_states.is_cpu(), kAllReduceLayerNorm, ": got ", describe(call.hidden_states),
            "; expected tensors on the CPU, or on a CUDA device and the package built with CUDA (see"
            " sgl_comm.build_info())");
  const auto group = groups().find(kAllReduceLayerNorm, group_name);
  Tensor new_residual = empty_row_major(kAllReduceLayerNorm, hidden_states);
  Tensor normed = sum_over_ranks(kAllReduceLayerNorm, Op::kAllReduceLayerNorm, *group, call.hidden_states);
  RowsToNormalise rows;
  rows.norm = call.norm;
  rows.dtype = call.dtype;
  rows.weight_dtype = dtype_of(call.weight.scalar_type());
  rows.rows = call.rows;
  rows.hidden = call.hidden;
  rows.sums = normed.const_data_ptr();
  rows.residual = call.residual.const_data_ptr();
  rows.weight = call.weight.const_data_ptr();
  if (call.bias.has_value()) {
    rows.bias_dtype = dtype_of(call.bias->scalar_type());
    rows.bias = call.bias->const_data_ptr();
  }
  rows.new_residual = new_residual.mutable_data_ptr();
  rows.normed = normed.mutable_data_ptr();
  add_and_normalise(rows);
  return {normed, new_residual};
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("tp_attn_all_reduce_and_layernorm", TORCH_BOX(&sgl_comm::cpu::all_reduce_layernorm));
}

// Devices without a form of their own, which it refuses.
STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("tp_attn_all_reduce_and_layernorm", TORCH_BOX(&sgl_comm::cpu::all_reduce_layernorm));
}
