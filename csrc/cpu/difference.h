// The arithmetic of a comparison: how far two rows of numbers are apart, in one pass over both.
#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <cstddef>
#include <cstdint>

namespace sgl_comm {

// What a comparison finds over pairs (theirs, ours). Sums and maxima cover only pairs in which both are finite.
struct Difference {
  int64_t finite = 0;     // pairs in which both are
  int64_t differing = 0;  // pairs whose bits are not the same
  int64_t theirs_nan = 0, ours_nan = 0, theirs_inf = 0, ours_inf = 0;
  double theirs_squared = 0, ours_squared = 0, difference_squared = 0;
  double max_abs = 0;
  double max_ulp = 0;  // in representable values of the dtype; 0 for integers
};

// What a comparison of all the pairs of both would have found.
Difference operator+(const Difference& a, const Difference& b);

// float32, bfloat16, float16, float64 or int64. Rounding: squares of the three short floats are added in fp32 in groups
// of a hundred or so, the groups in fp64; all else in fp64.
bool can_compare(torch::headeronly::ScalarType dtype);
Difference difference(torch::headeronly::ScalarType dtype, const void* theirs, const void* ours, size_t count);

}  // namespace sgl_comm
