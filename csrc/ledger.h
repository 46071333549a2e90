// What the CPU's and the CUDA library know of each other's calls of a group, on one rank: so that nobody takes a call
// of CPU tensors for one of CUDA tensors that a peer has made in its place.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <utility>

#include "tensor.h"

namespace sgl_comm {

// Two numbers in a tensor, which is how the libraries share them: the CPU's makes it, the CUDA library is given it.
class Ledger {
 public:
  Ledger() : Ledger(torch::stable::empty({2}, torch::headeronly::ScalarType::Long)) {
    numbers_[kCudaCalls] = numbers_[kCpuFailed] = 0;
  }
  explicit Ledger(Tensor tensor)
      : tensor_(std::move(tensor)), numbers_(static_cast<int64_t*>(tensor_.mutable_data_ptr())) {}

  const Tensor& tensor() const { return tensor_; }

  // How many calls of CUDA tensors this rank has made; a captured one counts once.
  uint64_t num_cuda_calls() const { return __atomic_load_n(numbers_ + kCudaCalls, __ATOMIC_RELAXED); }
  void count_cuda_call() { __atomic_fetch_add(numbers_ + kCudaCalls, 1, __ATOMIC_RELAXED); }

  // Whether a call of CPU tensors has failed: a peer may then wait for this rank in one of CUDA tensors.
  bool cpu_failed() const { return __atomic_load_n(numbers_ + kCpuFailed, __ATOMIC_RELAXED) != 0; }
  void set_cpu_failed() const { __atomic_store_n(numbers_ + kCpuFailed, 1, __ATOMIC_RELAXED); }

 private:
  enum { kCudaCalls, kCpuFailed };
  Tensor tensor_;
  int64_t* numbers_;
};

}  // namespace sgl_comm
