// RMSNorm and LayerNorm on the CPU: norm.h's arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"
#include "norm.h"

namespace sgl_comm {

// Rows of `hidden` elements, one after the other; all of `dtype` but the weights, which are all of one other dtype or
// of the same. A null bias is none.
struct RowsToNormalise {
  Norm norm;
  DType dtype, weight_dtype, bias_dtype;
  int64_t rows, hidden;
  const void* sums;
  const void* residual;
  const void* weight;
  const void* bias;
  void* new_residual;
  void* normed;  // may be `sums`
};

// new_residual = round(sums + residual), row by row; normed = round(norm(new_residual)).
void add_and_normalise(const RowsToNormalise& rows);

}  // namespace sgl_comm
