// Addresses as numbers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sgl_comm::cuda {

inline uintptr_t address_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }
inline bool is_aligned(const void* pointer, size_t bytes) { return address_of(pointer) % bytes == 0; }

}  // namespace sgl_comm::cuda
