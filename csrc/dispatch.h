// From run-time values to template constants: the dtypes a kernel sums and the worlds it knows. Nothing of torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace sgl_comm {

constexpr int kMaxWorld = 8;

// The dtypes this package sums by itself; all others go to the fallback.
enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kOther = 3 };

constexpr size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline const char* name_of(DType dtype) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "other"};
  return kNames[static_cast<int>(dtype)];
}

// Calls visit(std::integral_constant<DType, d>) for the given dtype, which must not be kOther.
template <typename Visitor>
decltype(auto) visit_dtype(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16:
      return visit(std::integral_constant<DType, DType::kFloat16>{});
    default:
      return visit(std::integral_constant<DType, DType::kFloat32>{});
  }
}

// Calls visit(std::integral_constant<int, world>) for a world of 2 to 8.
template <typename Visitor>
decltype(auto) visit_world(int world, Visitor&& visit) {
  switch (world) {
    case 3:
      return visit(std::integral_constant<int, 3>{});
    case 4:
      return visit(std::integral_constant<int, 4>{});
    case 5:
      return visit(std::integral_constant<int, 5>{});
    case 6:
      return visit(std::integral_constant<int, 6>{});
    case 7:
      return visit(std::integral_constant<int, 7>{});
    case 8:
      return visit(std::integral_constant<int, 8>{});
    default:
      return visit(std::integral_constant<int, 2>{});
  }
}

}  // namespace sgl_comm
