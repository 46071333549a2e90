// The only code that looks at a tensor's strides. Every other file sees row-major memory, a pointer and a count; or, in
// the kernels that walk a tensor where it lies, its Strides.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cctype>
#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "check.h"
#include "dispatch.h"
#include "policy.h"
#include "strides.h"

namespace sgl_comm {

using Tensor = torch::stable::Tensor;

inline DType dtype_of(torch::headeronly::ScalarType type) {
  switch (type) {
    case torch::headeronly::ScalarType::Float:
      return DType::kFloat32;
    case torch::headeronly::ScalarType::BFloat16:
      return DType::kBFloat16;
    case torch::headeronly::ScalarType::Half:
      return DType::kFloat16;
    default:
      return DType::kOther;
  }
}

// The dtype's name in PyTorch: "bfloat16".
inline std::string name_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Short:
      return "int16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Double:
      return "float64";
    case ScalarType::ComplexHalf:
      return "complex32";
    case ScalarType::ComplexFloat:
      return "complex64";
    case ScalarType::ComplexDouble:
      return "complex128";
    default:
      break;
  }
  std::string name = torch::headeronly::toString(type);  // the others differ in capitals alone
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  return name;
}

// For error messages: "bfloat16[4, 128] on cpu".
inline std::string describe(const Tensor& tensor) {
  std::ostringstream text;
  text << name_of(tensor.scalar_type()) << '[';
  for (int64_t d = 0; d < tensor.dim(); ++d) text << (d ? ", " : "") << tensor.size(d);
  text << "] on " << (tensor.is_cuda() ? "cuda" : tensor.is_cpu() ? "cpu" : "another device");
  return text.str();
}

inline int64_t num_bytes(const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); }

inline void check_strided(const char* op, const Tensor& tensor) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(tensor.get(), &layout));
  SGL_CHECK(layout == aoti_torch_layout_strided(), op, ": got a tensor without strides (sparse, or another layout);",
            " expected a strided one");
}

// A new tensor of these sizes and of `like`'s number of dimensions, dtype and device, uninitialised and row-major.
inline Tensor empty_row_major(const char* op, const Tensor& like, const int64_t* sizes) {
  const int64_t dim = like.dim();
  constexpr int64_t kInline = 8;
  int64_t inline_strides[kInline];
  std::vector<int64_t> long_strides(dim > kInline ? dim : 0);
  int64_t* strides = dim > kInline ? long_strides.data() : inline_strides;
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  int32_t dtype = 0, device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle out = nullptr;
  SGL_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &out) == AOTI_TORCH_SUCCESS,
            op, ": no memory for the result of the input, ", describe(like), "; torch has logged the cause");
  return Tensor(out);
}

// A new tensor of `like`'s sizes, dtype and device, uninitialised and row-major.
inline Tensor empty_row_major(const char* op, const Tensor& like) {
  int64_t* sizes = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(like.get(), &sizes));
  return empty_row_major(op, like, sizes);
}

// A new row-major tensor of the same values.
inline Tensor fresh_row_major(const char* op, const Tensor& tensor) {
  Tensor out = empty_row_major(op, tensor);
  torch::stable::copy_(out, tensor);
  return out;
}

// How often this library has copied a tensor for its layout's sake; for tests.
inline std::atomic<int64_t>& num_layout_copies() {
  static std::atomic<int64_t> copies{0};
  return copies;
}

inline bool is_row_major(const Tensor& tensor) { return tensor.is_contiguous(); }

// The tensor itself where it is row-major, else a row-major copy of it.
inline Tensor row_major(const Tensor& tensor) {
  if (is_row_major(tensor)) return tensor;
  ++num_layout_copies();
  return torch::stable::contiguous(tensor);
}

// Row-major values into a tensor of any strides.
inline void copy_back(const Tensor& values, Tensor& tensor) {
  ++num_layout_copies();
  torch::stable::copy_(tensor, values);
}

// How a kernel walks the tensor in units of so many bytes, of which an element has one or more. Nothing where a
// row-major copy serves better, or it is too large or has too many dimensions for Strides, with what one stride covers
// taken as one dimension.
inline std::optional<Strides> strides_of(const Tensor& tensor, int64_t unit_bytes) {
  struct Dim {
    int64_t size, stride;
  };
  std::vector<Dim> dims;
  int64_t units = 1, reach = 0;
  const auto add_inner = [&](const Dim& dim) {
    units *= dim.size;
    reach += (dim.size - 1) * dim.stride;
    if (dim.size == 1) return;
    if (!dims.empty() && dims.back().stride == dim.size * dim.stride) {
      dims.back() = {dims.back().size * dim.size, dim.stride};
    } else {
      dims.push_back(dim);
    }
  };
  const int64_t per_element = static_cast<int64_t>(tensor.element_size()) / unit_bytes;
  for (int64_t d = 0; d < tensor.dim(); ++d) add_inner({tensor.size(d), tensor.stride(d) * per_element});
  add_inner({per_element, 1});
  if (dims.size() > Strides::kDims || std::max(units, reach) > INT32_MAX) return std::nullopt;
  Strides strides;
  std::fill_n(strides.sizes, Strides::kDims, 1);
  std::fill_n(strides.strides, Strides::kDims, 0);
  for (size_t d = 0, to = Strides::kDims - dims.size(); d < dims.size(); ++d, ++to) {
    strides.sizes[to] = static_cast<int32_t>(dims[d].size);
    strides.strides[to] = static_cast<int32_t>(dims[d].stride);
  }
  return walk_pays(units, strides.run() * unit_bytes) ? std::optional(strides) : std::nullopt;
}

// Whether two of the tensor's elements share memory, as in the result of expand(). Exact.
inline bool overlaps_itself(const Tensor& tensor) {
  if (is_row_major(tensor) || tensor.numel() < 2) return false;
  struct Dim {
    int64_t stride, size;
  };
  std::vector<Dim> dims;
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    if (tensor.size(d) > 1) dims.push_back({tensor.stride(d), tensor.size(d)});
  }
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  // Each stride steps over all that the smaller ones reach: then no two elements can share memory.
  int64_t reach = 0;
  bool nested = true;
  for (const Dim& dim : dims) {
    nested = nested && dim.stride > reach;
    reach += dim.stride * (dim.size - 1);
  }
  if (nested) return false;
  if (dims.front().stride == 0) return true;
  // Interleaved strides (as_strided can make them): mark every offset that is used.
  std::vector<bool> used(reach + 1);
  std::vector<int64_t> index(dims.size());
  for (;;) {
    int64_t offset = 0;
    for (size_t d = 0; d < dims.size(); ++d) offset += index[d] * dims[d].stride;
    if (used[offset]) return true;
    used[offset] = true;
    size_t d = 0;
    while (d < dims.size() && ++index[d] == dims[d].size) index[d++] = 0;
    if (d == dims.size()) return false;
  }
}

// An error where the tensor cannot hold a result of its own in place.
inline void check_disjoint(const char* op, const Tensor& tensor) {
  SGL_CHECK(!overlaps_itself(tensor), op, ": got ", describe(tensor),
            " in which several elements share memory (expand); expected a tensor that can hold its result in place");
}

// Runs work(row-major tensor) so that the result ends in `tensor`, whatever its strides. Before: check_disjoint().
template <typename Work>
void in_place(Tensor& tensor, Work&& work) {
  if (is_row_major(tensor)) {
    work(tensor);
    return;
  }
  Tensor copy = row_major(tensor);
  work(copy);
  copy_back(copy, tensor);
}

// in_place() for work that reads nothing of the tensor and writes all of it.
template <typename Work>
void overwrite(const char* op, Tensor& tensor, Work&& work) {
  if (is_row_major(tensor)) {
    work(tensor);
    return;
  }
  Tensor out = empty_row_major(op, tensor);
  work(out);
  copy_back(out, tensor);
}

}  // namespace sgl_comm
