// What the cfg_ ops do before they send anything, on every device: what this rank finds wrong with a call and, where
// the group has SGLCOMM_CHECK, whether all ranks are about to make the same.
#pragma once

#include <exception>
#include <string>

#include "inference_only.h"
#include "tensor.h"

namespace sgl_comm {

inline void check_broadcast(const char* op, const Tensor& input, int64_t src, int world) {
  check_strided(op, input);
  check_inference_only(op, input);
  SGL_CHECK(src >= 0 && src < world, op, ": got src ", src, "; expected a rank of the group, 0 to ", world - 1);
}

// Alike on all ranks where they go together.
inline std::string describe_broadcast(const Tensor& input, int64_t src) {
  return "cfg_broadcast of " + describe(input) + " from rank " + std::to_string(src);
}

inline std::string describe_cfg_all_reduce(const Tensor& input, const std::string& reduce_op) {
  return "cfg_all_reduce of " + describe(input) + ", " + reduce_op;
}

// `checks` refuse what this rank is given by throwing; describe() is the call in words. compare(text, refused) throws
// on every rank unless all texts are alike and no call is refused, and all are in step still. Without SGLCOMM_CHECK a
// refusal is counted, by count_refusal().
template <typename Group, typename Checks, typename Describe, typename Compare, typename CountRefusal>
void agree(const Group& group, Checks&& checks, Describe&& describe, Compare&& compare, CountRefusal&& count_refusal) {
  const bool comparing = group.compare_calls && group.world > 1;
  try {
    checks();
  } catch (const std::exception& error) {
    if (comparing) {
      compare(std::string(error.what()), true);  // throws
    } else {
      count_refusal();
    }
    throw;
  }
  if (__builtin_expect(comparing, 0)) compare(describe(), false);
}

// Makes a call that the ranks agreed on. One that ends in an error before it has begun (no memory, say) is as good as
// refused: begun() is then what it was.
template <typename Begun, typename CountRefusal, typename Make>
auto make_agreed(Begun&& begun, CountRefusal&& count_refusal, Make&& make) {
  const auto before = begun();
  try {
    return make();
  } catch (...) {
    if (begun() == before) count_refusal();
    throw;
  }
}

}  // namespace sgl_comm
