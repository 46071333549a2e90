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
  const auto group = groups().find(kAllReduceLayerNorm, group_name);
  Tensor new_residual = empty_row_major(kAllReduceLayerNorm, hidden_states);
  Tensor normed = sum_over_ranks(kAllReduceLayerNorm, Call::Kind::kAllReduceLayerNorm, group, call.hidden_states);
  const bool has_bias = call.bias.has_value();
  add_and_normalise({call.norm, call.dtype, dtype_of(call.weight.scalar_type()),
                     has_bias ? dtype_of(call.bias->scalar_type()) : call.dtype, call.rows, call.hidden,
                     normed.const_data_ptr(), call.residual.const_data_ptr(), call.weight.const_data_ptr(),
                     has_bias ? call.bias->const_data_ptr() : nullptr, new_residual.mutable_data_ptr(),
                     normed.mutable_data_ptr()});
  return {normed, new_residual};
}

}  // namespace

}  // namespace sgl_comm::cpu

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CPU, m) {
  m.impl("tp_attn_all_reduce_and_layernorm", TORCH_BOX(&sgl_comm::cpu::all_reduce_layernorm));
}
