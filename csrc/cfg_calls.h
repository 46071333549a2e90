// What the cfg_ ops have in common on every device: the checks of their arguments, what a call is in words, and how
// ranks agree on a call before anything of it is sent.
#pragma once

#include <exception>
#include <string>

#include "fallback.h"
#include "input_checks.h"
#include "tensor.h"

namespace sgl_comm {

inline void check_all_reduce(const char* op, const Tensor& input, const std::string& reduce_op) {
  check_input(op, input);
  fallback::check_reduce_op(op, reduce_op);
}

inline void check_broadcast(const char* op, const Tensor& input, int64_t src, int world) {
  check_input(op, input);
  SGL_CHECK(src >= 0 && src < world, op, ": got src ", src, "; expected a rank of the group, 0 to ", world - 1);
}

// The words are alike on all ranks whose calls go together.
inline std::string describe_all_reduce(const Tensor& input, const std::string& reduce_op) {
  return "cfg_all_reduce of " + describe(input) + ", " + reduce_op;
}

inline std::string describe_broadcast(const Tensor& input, int64_t src) {
  return "cfg_broadcast of " + describe(input) + " from rank " + std::to_string(src);
}

// Makes a cfg_ call, if this rank does not refuse it and, with SGLCOMM_CHECK, all ranks are about to make the same
// call. A call has these members; the AgreedCall of a device's library has all but the first three:
//   check()                 throws where this rank refuses what it is given
//   describe()              the call in words
//   run()                   makes the call
//   compares()              whether the ranks compare their calls first (SGLCOMM_CHECK)
//   compare(text, refused)  throws on every rank unless all texts are alike and no rank refuses
//   count_refusal()         so that a refusal of this rank alone is not lost: its peers may have made the call
//   count_call()            for a call that all ranks make
//   num_begun()             how many calls have begun
template <typename Call>
auto run_agreed(Call call) {
  try {
    call.check();
  } catch (const std::exception& error) {
    if (call.compares()) call.compare(error.what(), true);  // throws
    call.count_refusal();
    throw;
  }
  if (__builtin_expect(call.compares(), 0)) call.compare(call.describe(), false);
  call.count_call();
  const auto begun = call.num_begun();
  try {
    return call.run();
  } catch (...) {
    if (call.num_begun() == begun) call.count_refusal();  // no memory, say: as good as refused
    throw;
  }
}

}  // namespace sgl_comm
