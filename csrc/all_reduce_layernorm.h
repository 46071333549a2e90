// What both forms of tp_attn_all_reduce_and_layernorm share: the check of its arguments.
#pragma once

#include <cmath>
#include <optional>
#include <string>

#include "dispatch.h"
#include "input_checks.h"
#include "norm.h"
#include "ops.h"
#include "tensor.h"

namespace sgl_comm {

constexpr const char* kAllReduceLayerNorm = name_of(Op::kAllReduceLayerNorm);

// The arguments, checked and row-major.
struct LayerNormCall {
  Tensor hidden_states, residual, weight;
  std::optional<Tensor> bias;
  Norm norm{};
  DType dtype = DType::kOther;
  int64_t hidden = 0;  // elements of a row
  int64_t rows = 0;
};

inline Tensor checked_weight(const char* name, const Tensor& weight, const Tensor& hidden_states) {
  constexpr const char* kOp = kAllReduceLayerNorm;
  check_input(kOp, weight);
  const int64_t hidden = hidden_states.size(hidden_states.dim() - 1);
  const bool known = weight.scalar_type() == hidden_states.scalar_type() ||
                     weight.scalar_type() == torch::headeronly::ScalarType::Float;
  SGL_CHECK(weight.dim() == 1 && weight.size(0) == hidden && known && weight.device() == hidden_states.device(), kOp,
            ": got ", name, " ", describe(weight), "; expected [", hidden, "], of float32 or of the dtype of",
            " hidden_states, ", describe(hidden_states), ", and on its device");
  return row_major(weight);
}

inline LayerNormCall check_layernorm(const Tensor& hidden_states, const Tensor& residual, const Tensor& weight,
                                     const std::optional<Tensor>& bias, double eps, const std::string& norm,
                                     double weight_offset) {
  constexpr const char* kOp = kAllReduceLayerNorm;
  check_input(kOp, hidden_states);
  check_input(kOp, residual);
  SGL_CHECK(hidden_states.dim() >= 1, kOp, ": got hidden_states ", describe(hidden_states),
            "; expected at least one dimension, the last of which is normalised");
  const DType dtype = dtype_of(hidden_states.scalar_type());
  SGL_CHECK(dtype != DType::kOther, kOp, ": got hidden_states ", describe(hidden_states), "; expected ",
            kSummedDTypeNames);
  bool alike = residual.dim() == hidden_states.dim() && residual.scalar_type() == hidden_states.scalar_type() &&
               residual.device() == hidden_states.device();
  for (int64_t d = 0; alike && d < residual.dim(); ++d) alike = residual.size(d) == hidden_states.size(d);
  SGL_CHECK(alike, kOp, ": got residual ", describe(residual), "; expected the shape, dtype and device of",
            " hidden_states, ", describe(hidden_states));
  SGL_CHECK(norm == "rms" || norm == "layer", kOp, ": got norm '", norm, "'; expected 'rms' or 'layer'");
  SGL_CHECK(norm == "layer" || !bias.has_value(), kOp, ": got a bias with norm 'rms'; expected none, or norm 'layer'");
  SGL_CHECK(std::isfinite(eps) && eps >= 0, kOp, ": got eps ", eps, "; expected a finite number, at least 0");
  SGL_CHECK(std::isfinite(weight_offset), kOp, ": got weight_offset ", weight_offset, "; expected a finite number");
  const int64_t hidden = hidden_states.size(hidden_states.dim() - 1);
  LayerNormCall call;
  call.hidden_states = row_major(hidden_states);
  call.residual = row_major(residual);
  call.weight = checked_weight("weight", weight, hidden_states);
  call.norm.layer = norm == "layer";
  call.norm.eps = static_cast<float>(eps);
  call.norm.weight_offset = static_cast<float>(weight_offset);
  call.dtype = dtype;
  call.hidden = hidden;
  call.rows = hidden == 0 ? 0 : hidden_states.numel() / hidden;
  if (bias.has_value()) call.bias = checked_weight("bias", *bias, hidden_states);
  return call;
}

}  // namespace sgl_comm
