// The kernels' element types by the host's DType.
#pragma once

#include <type_traits>

#include "cuda/device/pack.cuh"
#include "dispatch.h"

namespace sgl_comm::cuda {

template <DType kType>
using DeviceType = std::conditional_t<kType == DType::kFloat32, device::Float32,
                                      std::conditional_t<kType == DType::kBFloat16, device::BFloat16, device::Float16>>;

}  // namespace sgl_comm::cuda
