// RMSNorm and LayerNorm on the CPU: norm.h's arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"
#include "norm.h"

namespace sgl_comm {

// Rows of `hidden` elements, one after the other, of `dtype`. A null bias is none.
struct RowsToNormalise {
  Norm norm{};
  DType dtype = DType::kOther, weight_dtype = DType::kOther, bias_dtype = DType::kOther;
  int64_t rows = 0, hidden = 0;
  const void* sums = nullptr;
  const void* residual = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  void* new_residual = nullptr;
  void* normed = nullptr;  // may be `sums`
};

// new_residual = round(sums + residual), row by row; normed = round(norm(new_residual)).
void add_and_normalise(const RowsToNormalise& rows);

}  // namespace sgl_comm
