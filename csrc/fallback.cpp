// What every device gets that has no kernel of its own here: NCCL or gloo.
#include "fallback.h"

#include <torch/csrc/stable/library.h>

#include "cpu/groups.h"
#include "inference_only.h"
#include "text.h"

namespace sgl_comm::fallback {

namespace {

Tensor all_reduce_any_device(const Tensor& input, const Text& group_name, const Text& reduce_op) {
  check_strided("all_reduce", input);
  check_inference_only("all_reduce", input);
  check_reduce_op("all_reduce", reduce_op);
  cpu::groups().find("all_reduce", group_name);
  return all_reduce("all_reduce", input, group_name, reduce_op);
}

Tensor refuse_custom_all_reduce_v2(const Tensor& input, const Text&, const Text&) {
  fail("sgl_comm::custom_all_reduce_v2: got ", describe(input),
       "; expected a CUDA tensor and the package built with CUDA (see sgl_comm.build_info()); sgl_comm::all_reduce"
       " serves every device");
}

}  // namespace

}  // namespace sgl_comm::fallback

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeExplicitAutograd, m) {
  m.impl("all_reduce", TORCH_BOX(&sgl_comm::fallback::all_reduce_any_device));
  m.impl("custom_all_reduce_v2", TORCH_BOX(&sgl_comm::fallback::refuse_custom_all_reduce_v2));
}
