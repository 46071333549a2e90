#include "cpu/row_norm.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <vector>

#include "cpu/floating_point.h"
#include "cpu/sum.h"

namespace sgl_comm {

namespace scalar {
#include "cpu/vec.h"
}  // namespace scalar

namespace {

void widen(DType dtype, const void* in, float* out, int64_t count) {
  visit_dtype(dtype, [&](auto d) {
    const char* from = static_cast<const char*>(in);
    for (int64_t i = 0; i < count; ++i) out[i] = scalar::Vec<d.value>::load(from + i * size_of(d.value));
  });
}

void narrow(DType dtype, const float* in, void* out, int64_t count) {
  visit_dtype(dtype, [&](auto d) {
    char* to = static_cast<char*>(out);
    for (int64_t i = 0; i < count; ++i) scalar::Vec<d.value>::store(to + i * size_of(d.value), in[i]);
  });
}

// The sum of kTree neighbours as a tree: first those half of them apart, down to direct neighbours.
float sum_of_tree(float* v) {
  for (int half = kTree / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] = add(v[i], v[i + half]);
  }
  return v[0];
}

// The sum of a row as norm.h has it; values[i] for i < hidden, and zeros up to the end of the last vector.
class RowSum {
 public:
  explicit RowSum(int64_t hidden) : vectors_(row_vectors(hidden)), num_partials_(row_partials(hidden)) {}

  template <typename Value>
  float of(const float* values, Value&& value) {
    float partials[kMostPartials] = {}, trees[kTree] = {};
    for (int64_t g = 0; g < vectors_; ++g) {
      float vector[kVector];
      for (int i = 0; i < kVector; ++i) vector[i] = value(values[g * kVector + i]);
      float& partial = partials[g % num_partials_];
      partial = g < num_partials_ ? sum_of_vector(vector) : add(partial, sum_of_vector(vector));
    }
    const int num_trees = num_partials_ / kTree;
    for (int t = 0; t < num_trees; ++t) trees[t] = sum_of_tree(partials + t * kTree);
    return num_trees == 1 ? trees[0] : sum_of_tree(trees);
  }

 private:
  const int64_t vectors_;
  const int num_partials_;
};

}  // namespace

void add_and_normalise(const RowsToNormalise& rows) {
  const int64_t hidden = rows.hidden, padded = row_vectors(hidden) * kVector;
  const size_t row_bytes = hidden * size_of(rows.dtype);
  const DefaultFloatingPoint guard;
  std::vector<float> weight(hidden), bias(rows.bias != nullptr ? hidden : 0), values(padded), out(hidden);
  widen(rows.weight_dtype, rows.weight, weight.data(), hidden);
  for (float& w : weight) w = add(w, rows.norm.weight_offset);
  if (rows.bias != nullptr) widen(rows.bias_dtype, rows.bias, bias.data(), hidden);
  RowSum sum(hidden);
  const RowLength length = row_length(hidden);
  for (int64_t row = 0; row < rows.rows; ++row) {
    const auto at = [&](auto* p) { return p + row * row_bytes; };
    const void* const terms[] = {at(static_cast<const char*>(rows.sums)), at(static_cast<const char*>(rows.residual))};
    char* const new_residual = at(static_cast<char*>(rows.new_residual));
    sum_in_order(rows.dtype, new_residual, terms, 2, hidden);
    widen(rows.dtype, new_residual, values.data(), hidden);
    if (rows.norm.layer) {
      const float mean = divide(sum.of(values.data(), [](float x) { return x; }), length);
      for (int64_t i = 0; i < hidden; ++i) values[i] = add(values[i], -mean);
    }
    const float squares = sum.of(values.data(), [](float x) { return mul(x, x); });
    const float factor = norm_factor(squares, length, rows.norm.eps);
    for (int64_t i = 0; i < hidden; ++i) out[i] = normalised(values[i], factor, weight[i]);
    for (size_t i = 0; i < bias.size(); ++i) out[i] = add(out[i], bias[i]);
    narrow(rows.dtype, out.data(), at(static_cast<char*>(rows.normed)), hidden);
  }
}

}  // namespace sgl_comm
