// A plain struct as the bytes that ranks exchange at init, and back.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "tensor.h"

namespace sgl_comm {

template <typename Handle>
Tensor to_bytes(const Handle& handle) {
  static_assert(std::is_trivially_copyable_v<Handle>);
  Tensor bytes = torch::stable::empty({static_cast<int64_t>(sizeof handle)}, torch::headeronly::ScalarType::Byte);
  std::memcpy(bytes.mutable_data_ptr(), &handle, sizeof handle);
  return bytes;
}

// The handles of all ranks, one after the other in rank order.
template <typename Handle>
std::vector<Handle> from_bytes(const Tensor& bytes, int world) {
  const size_t expected = world * sizeof(Handle);
  SGL_CHECK(static_cast<size_t>(bytes.numel()) == expected, "init: got ", describe(bytes), " as handles; expected ",
            expected, " bytes");
  std::vector<Handle> handles(world);
  std::memcpy(static_cast<void*>(handles.data()), row_major(bytes).const_data_ptr(), expected);
  return handles;
}

}  // namespace sgl_comm
