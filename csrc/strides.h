// Where a tensor's elements lie, in row-major order, as kernels can walk them. Plain: shared by host and device.
#pragma once

#include <cstdint>

namespace sgl_comm {

// Dimensions from the outermost on; where there are fewer, the first have size 1. Sizes and strides are in whatever the
// kernel moves, and neither an index nor an offset needs more than 31 bits.
struct Strides {
  static constexpr int kDims = 4;
  int32_t sizes[kDims];
  int32_t strides[kDims];

  // How many lie side by side.
  int64_t run() const { return strides[kDims - 1] == 1 ? sizes[kDims - 1] : 1; }
};

}  // namespace sgl_comm
