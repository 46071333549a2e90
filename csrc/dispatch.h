// From run-time values to template constants: the dtypes that this package sums and the numbers of ranks that it
// serves. Plain: kernels read this too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "check.h"

namespace sgl_comm {

constexpr int kMaxWorld = 8;

// The dtypes that this package sums by itself; kOther is every other one, which goes to the fallback.
enum class DType : int32_t { kFloat32, kBFloat16, kFloat16, kOther };
constexpr DType kSummedDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr const char* kSummedDTypeNames = "float32, bfloat16 or float16";  // for errors

// Bytes of an element; kOther is an error.
constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kOther:
      break;
  }
  fail("sgl_comm: no size is known of dtype number ", static_cast<int>(dtype));
}

// Calls visit(std::integral_constant<DType, dtype>); kOther is an error.
template <typename Visitor>
decltype(auto) visit_dtype(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(std::integral_constant<DType, DType::kFloat32>{});
    case DType::kBFloat16:
      return visit(std::integral_constant<DType, DType::kBFloat16>{});
    case DType::kFloat16:
      return visit(std::integral_constant<DType, DType::kFloat16>{});
    case DType::kOther:
      break;
  }
  fail("sgl_comm: no kernel sums dtype number ", static_cast<int>(dtype));
}

// Calls visit(std::integral_constant<int, world>); another world than 2 to kMaxWorld is an error.
template <typename Visitor>
decltype(auto) visit_world(int world, Visitor&& visit) {
  static_assert(kMaxWorld == 8);
  switch (world) {
    case 2:
      return visit(std::integral_constant<int, 2>{});
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
  }
  fail("sgl_comm: no kernel serves ", world, " ranks; expected 2 to ", kMaxWorld);
}

}  // namespace sgl_comm
