// What every device gets that has no kernel of its own here: NCCL or gloo; and the definition of the in-place op by
// the functional one, which compilers trace.
#include "fallback.h"

#include <torch/csrc/stable/library.h>

#include <array>

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

// all_reduce_ is all_reduce and a copy. Decomposed so, its place among functional calls is kept by the same ordered
// effect as theirs; a kernel registered for a device replaces it there when nothing is traced.
void all_reduce_by_copy(Tensor input, const Text& group_name, const Text& reduce_op) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 3> stack{from(input), from<std::string>(group_name), from<std::string>(reduce_op)};
  SGL_CHECK(torch_call_dispatcher("sgl_comm::all_reduce", "", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
            "all_reduce_: all_reduce failed on ", describe(input), "; torch printed the cause on stderr");
  torch::stable::copy_(input, to<Tensor>(stack[0]));
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

STABLE_TORCH_LIBRARY_IMPL(sgl_comm, CompositeImplicitAutograd, m) {
  m.impl("all_reduce_", TORCH_BOX(&sgl_comm::fallback::all_reduce_by_copy));
}
