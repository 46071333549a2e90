// What the CPU's and the CUDA library know of each other's calls of a group, on one rank: so that nobody takes a call
// of CPU tensors for one of CUDA tensors that a peer has made instead, or that a peer has refused.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <utility>

#include "tensor.h"

namespace sgl_comm {

// Numbers in a tensor, which is how the libraries share them: the CPU's makes it, the CUDA library is given it.
class Ledger {
 public:
  Ledger() : Ledger(torch::stable::empty({kNumbers}, torch::headeronly::ScalarType::Long)) {
    std::fill_n(numbers_, int{kNumbers}, 0);
  }
  explicit Ledger(Tensor tensor)
      : tensor_(std::move(tensor)), numbers_(static_cast<int64_t*>(tensor_.mutable_data_ptr())) {}

  const Tensor& tensor() const { return tensor_; }

  // How many cfg_ calls of CUDA tensors this rank has made; a captured one counts once.
  uint64_t num_cuda_calls() const { return get(kCudaCalls); }
  void count_cuda_call() const { count(kCudaCalls); }

  // How many cfg_ calls of either's tensors it has refused.
  uint64_t num_refusals() const { return get(kRefusals); }
  void count_refusal() const { count(kRefusals); }

  // Whether a call of CPU tensors has failed: a peer may then wait for this rank in one of CUDA tensors.
  bool cpu_failed() const { return get(kCpuFailed) != 0; }
  void set_cpu_failed() const { __atomic_store_n(numbers_ + kCpuFailed, 1, __ATOMIC_RELAXED); }

 private:
  enum { kCudaCalls, kRefusals, kCpuFailed, kNumbers };
  uint64_t get(int which) const { return __atomic_load_n(numbers_ + which, __ATOMIC_RELAXED); }
  void count(int which) const { __atomic_fetch_add(numbers_ + which, 1, __ATOMIC_RELAXED); }

  Tensor tensor_;
  int64_t* numbers_;
};

}  // namespace sgl_comm
