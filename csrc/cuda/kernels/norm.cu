// Holds the norm kernel: residual and RMSNorm or LayerNorm of rows whose sums over ranks are there already.
#include "cuda/device/dispatch.cuh"
#include "cuda/device/norm.cuh"
#include "cuda/kernels/push_kernels.h"

namespace sgl_comm::device {

// Each row is a block's. Each thread reads back only what it has itself written.
template <typename T, bool kAligned>
__global__ void __launch_bounds__(kMostPartials) norm_kernel(const __grid_constant__ NormParameters params) {
  __shared__ RowSumShared shared;
  const int64_t hidden = params.hidden, vectors = row_vectors(hidden);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * hidden;
  const auto row = [&](const void* array) { return static_cast<const typename T::Bits*>(array) + first; };
  const auto row_of = [&](void* array) { return static_cast<typename T::Bits*>(array) + first; };
  RowSum<1> sum(shared);
  float v[kVector], other[kVector];
  float total[1] = {0.0f};
  // The total of what each vector adds, in their order.
  const auto each_vector = [&](auto&& value) {
    for (int64_t g = threadIdx.x; g < vectors; g += blockDim.x) {
      const float one = value(g);
      total[0] = g < blockDim.x ? one : add(total[0], one);
    }
    const float all = sum.of(total);
    total[0] = 0.0f;
    return all;
  };
  ptx::wait_for_previous_kernel();
  ptx::launch_next_kernel();
  sum.begin();
  const float first_sum = each_vector([&](int64_t g) {
    load_vector<T, kAligned>(row(params.sums), hidden, g, v);
    load_vector<T, kAligned>(row(params.residual), hidden, g, other);
    add_residual<T>(v, other);
    store_vector<T, kAligned>(row_of(params.new_residual), hidden, g, v);
    return params.norm.layer ? sum_of_vector(v) : sum_of_squares(v);
  });
  const float mean = params.norm.layer ? divide(first_sum, params.length) : 0.0f;
  const auto reload = [&](int64_t g) {
    load_vector<T, kAligned>(row(params.new_residual), hidden, g, v);
    if (params.norm.layer) subtract_mean(v, mean, present(hidden, g));
  };
  const float squares = !params.norm.layer ? first_sum : each_vector([&](int64_t g) {
    reload(g);
    return sum_of_squares(v);
  });
  const float factor = norm_factor(squares, params.length, params.norm.eps);
  for (int64_t g = threadIdx.x; g < vectors; g += blockDim.x) {
    reload(g);
    load_weights<T, kAligned>(params.weight, hidden, g, other);
    scale(v, factor, other, params.norm.weight_offset);
    if (params.bias.data != nullptr) {
      load_weights<T, kAligned>(params.bias, hidden, g, other);
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[i] = add(v[i], other[i]);
    }
    store_vector<T, kAligned>(row_of(params.normed), hidden, g, v);
  }
}

}  // namespace sgl_comm::device

namespace sgl_comm::cuda {

NormKernel norm_kernel(DType dtype, bool aligned) {
  return visit_dtype(dtype, [&](auto d) -> NormKernel {
    using T = DeviceType<d.value>;
    return aligned ? device::norm_kernel<T, true> : device::norm_kernel<T, false>;
  });
}

}  // namespace sgl_comm::cuda
