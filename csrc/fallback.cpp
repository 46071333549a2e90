// What every device gets that has no kernel of its own here: NCCL or gloo.
#include "fallback.h"

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "all_reduce_layernorm.h"
#include "cfg_calls.h"
#include "cpu/agreement.h"
#include "inference_only.h"
#include "text.h"

namespace sgl_comm::fallback {

namespace {

cpu::Groups::GroupPtr check(const char* op, const Tensor& input, const std::string& group_name) {
  check_strided(op, input);
  check_inference_only(op, input);
  return cpu::groups().find(op, group_name);
}

Tensor all_reduce_any_device(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  check_reduce_op("all_reduce", reduce_op);
  check("all_reduce", input, group_name);
  return all_reduce("all_reduce", input, group_name, reduce_op);
}

Tensor cfg_all_reduce_any_device(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  constexpr const char* kOp = "cfg_all_reduce";
  const auto checks = [&] {
    check_reduce_op(kOp, reduce_op);
    check(kOp, input, group_name);
  };
  return cpu::call_agreed(
      kOp, cpu::groups().find(kOp, group_name), checks, [&] { return describe_cfg_all_reduce(input, reduce_op); },
      [&] { return all_reduce(kOp, input, group_name, reduce_op); });
}

Tensor cfg_broadcast_any_device(const Tensor& input, int64_t src, const Text& group_name) {
  constexpr const char* kOp = "cfg_broadcast";
  const auto group = cpu::groups().find(kOp, group_name);
  return cpu::call_agreed(
      kOp, group, [&] { check_broadcast(kOp, input, src, group->world); },
      [&] { return describe_broadcast(input, src); },
      [&] {
        if (group->world == 1) return fresh_row_major(kOp, input);
        return broadcast(kOp, input, src, group->name, group->rank);
      });
}

Tensor reduce_scatter_any_device(const Tensor& input, const Text& group_name) {
  const auto group = check("reduce_scatter", input, group_name);
  return reduce_scatter("reduce_scatter", input, group_name, group->world);
}

Tensor all_gather_any_device(const Tensor& input, const Text& group_name) {
  const auto group = check("all_gather", input, group_name);
  return all_gather("all_gather", input, group_name, group->world);
}

[[noreturn]] void refuse(const char* op, const Tensor& input) {
  fail("sgl_comm::", op, ": got ", describe(input),
       "; expected a CUDA tensor and the package built with CUDA (see sgl_comm.build_info()); sgl_comm::all_reduce"
       " serves every device");
}

Tensor refuse_custom_all_reduce_v1(const Tensor& input, const Text&) { refuse("custom_all_reduce_v1", input); }

Tensor refuse_custom_all_reduce_v2(const Tensor& input, const Text&, const Text&) {
  refuse("custom_all_reduce_v2", input);
}

std::tuple<Tensor, Tensor> refuse_all_reduce_layernorm(const Tensor& hidden_states, const Tensor& residual,
                                                       const Tensor& weight, const std::optional<Tensor>& bias,
                                                       double eps, const Text& norm, double weight_offset,
                                                       const Text&) {
  check_layernorm(hidden_states, residual, weight, bias, eps, norm, weight_offset);
  fail(
      "sgl_comm::", kAllReduceLayerNorm, ": got ", describe(hidden_states),
      "; expected tensors on the CPU, or on a CUDA device and the package built with CUDA (see sgl_comm.build_info())");
}

}  // namespace

}  // namespace sgl_comm::fallback

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("all_reduce", TORCH_BOX(&sgl_comm::fallback::all_reduce_any_device));
  m.impl("cfg_all_reduce", TORCH_BOX(&sgl_comm::fallback::cfg_all_reduce_any_device));
  m.impl("cfg_broadcast", TORCH_BOX(&sgl_comm::fallback::cfg_broadcast_any_device));
  m.impl("reduce_scatter", TORCH_BOX(&sgl_comm::fallback::reduce_scatter_any_device));
  m.impl("all_gather", TORCH_BOX(&sgl_comm::fallback::all_gather_any_device));
  m.impl("tp_attn_all_reduce_and_layernorm", TORCH_BOX(&sgl_comm::fallback::refuse_all_reduce_layernorm));
  m.impl("custom_all_reduce_v1", TORCH_BOX(&sgl_comm::fallback::refuse_custom_all_reduce_v1));
  m.impl("custom_all_reduce_v2", TORCH_BOX(&sgl_comm::fallback::refuse_custom_all_reduce_v2));
}
