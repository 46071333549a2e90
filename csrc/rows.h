// Sizes of the results of ops that join or divide tensors along dim 0: rank r's share is the r-th of equal ones.
#pragma once

#include <vector>

#include "tensor.h"

namespace sgl_comm {

inline std::vector<int64_t> sizes_with_rows(const char* op, const Tensor& input) {
  SGL_CHECK(input.dim() >= 1, op, ": got ", describe(input), "; expected at least one dimension");
  std::vector<int64_t> sizes(input.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = input.size(d);
  return sizes;
}

// What all_gather gives: every rank's rows.
inline std::vector<int64_t> gathered_sizes(const char* op, const Tensor& input, int world) {
  std::vector<int64_t> sizes = sizes_with_rows(op, input);
  sizes[0] *= world;
  return sizes;
}

// What reduce_scatter gives: one rank's share of the rows.
inline std::vector<int64_t> scattered_sizes(const char* op, const Tensor& input, int world) {
  std::vector<int64_t> sizes = sizes_with_rows(op, input);
  SGL_CHECK(sizes[0] % world == 0, op, ": got ", describe(input), "; expected the size of dim 0 to be a multiple of ",
            world, ", the number of ranks");
  sizes[0] /= world;
  return sizes;
}

}  // namespace sgl_comm
