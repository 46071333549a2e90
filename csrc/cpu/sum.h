// The CPU's one piece of arithmetic: fp32 sums in rank order, rounded once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "dispatch.h"

namespace sgl_comm {

// out[i] = round(sources[0][i] + sources[1][i] + ... ), added in fp32 in that order, starting from sources[0]'s value,
// rounded once to nearest even. Subnormals are kept, whatever the thread's flush-to-zero flags. `out` may be one of the
// sources, at the same address; none needs alignment. 2 to kMaxWorld sources.
void sum_in_order(DType dtype, void* out, const void* const* sources, int num_sources, size_t count);

}  // namespace sgl_comm
