// RMSNorm and LayerNorm of rows: norm.h's arithmetic. The threads of a block, or of a cluster of blocks, have one row
// at a time.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/parameters.h"
#include "cuda/device/row_sum.cuh"
#include "norm.h"

namespace sgl_comm::device {

template <typename T>
constexpr int kGroupPacks = kGroup / T::kLanes;

// A group of a row-major row of `hidden` elements, as fp32; zeros beyond its end. kWhole as in pack.cuh.
template <typename T, bool kWhole>
__device__ __forceinline__ void load_group(const void* row, int64_t hidden, int64_t group, float (&v)[kGroup]) {
#pragma unroll
  for (int q = 0; q < kGroupPacks<T>; ++q) {
    float lanes[T::kLanes];
    T::unpack(load_pack<T, kWhole>(row, hidden, group * kGroupPacks<T> + q), lanes);
#pragma unroll
    for (int i = 0; i < T::kLanes; ++i) v[q * T::kLanes + i] = lanes[i];
  }
}

template <typename T, bool kWhole>
__device__ __forceinline__ void store_group(void* row, int64_t hidden, int64_t group, const float (&v)[kGroup]) {
#pragma unroll
  for (int q = 0; q < kGroupPacks<T>; ++q) {
    float lanes[T::kLanes];
#pragma unroll
    for (int i = 0; i < T::kLanes; ++i) lanes[i] = v[q * T::kLanes + i];
    store_pack<T, kWhole>(row, hidden, group * kGroupPacks<T> + q, T::pack(lanes));
  }
}

template <typename T, bool kWhole>
__device__ __forceinline__ void load_weights(const Weights& weights, int64_t hidden, int64_t group,
                                             float (&v)[kGroup]) {
  if (weights.wide) {
    load_group<Float32, kWhole>(weights.data, hidden, group, v);
  } else {
    load_group<T, kWhole>(weights.data, hidden, group, v);
  }
}

// Rounds to the dtype and back.
template <typename T>
__device__ __forceinline__ void round_to(float (&v)[kGroup]) {
#pragma unroll
  for (int q = 0; q < kGroupPacks<T>; ++q) {
    float lanes[T::kLanes];
#pragma unroll
    for (int i = 0; i < T::kLanes; ++i) lanes[i] = v[q * T::kLanes + i];
    T::unpack(T::pack(lanes), lanes);
#pragma unroll
    for (int i = 0; i < T::kLanes; ++i) v[q * T::kLanes + i] = lanes[i];
  }
}

// The new residual: sum + residual, rounded.
template <typename T>
__device__ __forceinline__ void add_residual(float (&v)[kGroup], const float (&residual)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = add(v[i], residual[i]);
  round_to<T>(v);
}

// How many of a group's elements lie within the row.
__device__ __forceinline__ int present(int64_t hidden, int64_t group) {
  const int64_t left = hidden - group * kGroup;
  return left < kGroup ? static_cast<int>(left) : kGroup;
}

__device__ __forceinline__ void subtract_mean(float (&v)[kGroup], float mean, int count) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = i < count ? add(v[i], -mean) : 0.0f;
}

__device__ __forceinline__ float sum_of_squares(const float (&v)[kGroup]) {
  float squares[kGroup];
#pragma unroll
  for (int i = 0; i < kGroup; ++i) squares[i] = mul(v[i], v[i]);
  return sum_of_group(squares);
}

__device__ __forceinline__ void scale(float (&v)[kGroup], float factor, const float (&weight)[kGroup], float offset) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) v[i] = normalised(v[i], factor, add(weight[i], offset));
}

// Which packs of a row-major array of rows are this thread's: of each row those of its slots, kGroups groups at most.
template <typename T, int kGroups>
class RowPacks {
 public:
  static constexpr int kCount = kGroups * kGroupPacks<T>;  // of a row
  using Array = uint4[kCount];

  // hidden: a multiple of kGroup.
  template <int kSlots>
  __device__ __forceinline__ RowPacks(const RowSum<kSlots>& sum, int hidden)
      : slot_(sum.slot()), threads_(sum.num_threads()), groups_(hidden / kGroup) {}

  __device__ __forceinline__ int hidden() const { return groups_ * kGroup; }
  __device__ __forceinline__ int of_row() const { return groups_ * kGroupPacks<T>; }
  __device__ __forceinline__ int group(int u) const { return slot_ + u * threads_; }
  __device__ __forceinline__ bool has_group(int u) const { return group(u) < groups_; }

  // Calls visit(n, i) for each of them in a row: the n-th, which is pack i of the array.
  template <typename Visit>
  __device__ __forceinline__ void each(int row, Visit&& visit) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int u = n / kGroupPacks<T>;
      if (has_group(u)) visit(n, (row * groups_ + group(u)) * kGroupPacks<T> + n % kGroupPacks<T>);
    }
  }
  // Where the first of them is in a row.
  __device__ __forceinline__ const uint4* first(const void* array, int row) const {
    return static_cast<const uint4*>(array) + (row * groups_ + slot_) * kGroupPacks<T>;
  }
  __device__ __forceinline__ void load(const uint4* first, Array& packs) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int u = n / kGroupPacks<T>;
      if (has_group(u)) packs[n] = ptx::load_input(first + u * threads_ * kGroupPacks<T> + n % kGroupPacks<T>);
    }
  }
  __device__ __forceinline__ void load(const void* array, int row, Array& packs) const {
    load(first(array, row), packs);
  }
  __device__ __forceinline__ void copy(const Array& from, Array& to) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) to[n] = from[n];
  }
  // The n-th pack, as what its lanes are of `v`.
  __device__ __forceinline__ void widen(uint4 pack, int n, float (&v)[kGroups][kGroup]) const {
    float lanes[T::kLanes];
    T::unpack(pack, lanes);
#pragma unroll
    for (int k = 0; k < T::kLanes; ++k) v[n / kGroupPacks<T>][n % kGroupPacks<T> * T::kLanes + k] = lanes[k];
  }
  __device__ __forceinline__ void store(void* array, int row, const float (&v)[kGroups][kGroup]) const {
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
      if (has_group(u)) store_group<T, true>(static_cast<uint4*>(array) + row * of_row(), hidden(), group(u), v[u]);
    }
  }

 private:
  const int slot_, threads_, groups_;
};

// The weights or the biases of a thread's groups, as they are in memory: what is asked for early is unpacked late.
template <typename T, int kGroups>
class RowWeights {
 public:
  __device__ __forceinline__ RowWeights(const RowPacks<T, kGroups>& packs, const Weights& weights)
      : wide_(kGroupPacks<T> == kWidePacks || weights.wide), any_(weights.data != nullptr) {
    if (!any_) return;
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
      const uint4* const first = static_cast<const uint4*>(weights.data) + packs.group(u) * (wide_ ? kWidePacks : 1);
      if (!packs.has_group(u)) continue;
      packs_[u][0] = ptx::load_input(first);
      if (wide_) packs_[u][1] = ptx::load_input(first + 1);
    }
  }
  __device__ __forceinline__ explicit operator bool() const { return any_; }

  __device__ __forceinline__ void get(int u, float (&v)[kGroup]) const {
    float lanes[Float32::kLanes];
    if (wide_) {
#pragma unroll
      for (int q = 0; q < kWidePacks; ++q) {
        Float32::unpack(packs_[u][q], lanes);
#pragma unroll
        for (int k = 0; k < Float32::kLanes; ++k) v[q * Float32::kLanes + k] = lanes[k];
      }
    } else if constexpr (T::kLanes == kGroup) {
      T::unpack(packs_[u][0], v);
    }
  }

 private:
  static constexpr int kWidePacks = kGroupPacks<Float32>;

  uint4 packs_[kGroups][kWidePacks];
  const bool wide_, any_;
};

// The norm of a row, in place, of which each thread has some groups, in one slot or each in its own; `v` of others is
// 0. biases() gives the biases when they are needed. Needs all threads of the row.
template <typename T, int kGroups, int kSlots, typename Biases>
__device__ __forceinline__ void normalise(float (&v)[kGroups][kGroup], const RowPacks<T, kGroups>& packs,
                                          const RowWeights<T, kGroups>& weights, Biases&& biases, const Norm& norm,
                                          RowLength length, RowSum<kSlots>& row_sum) {
  static_assert(kSlots == 1 || kSlots == kGroups);
  float all;
#pragma unroll 1
  for (bool centred = !norm.layer;; centred = true) {
    float totals[kSlots];
#pragma unroll
    for (int u = 0; u < kGroups; ++u) {
      float terms[kGroup];
#pragma unroll
      for (int k = 0; k < kGroup; ++k) terms[k] = centred ? mul(v[u][k], v[u][k]) : v[u][k];
      if (u < kSlots) {
        totals[u] = sum_of_group(terms);
      } else if (packs.has_group(u)) {
        totals[0] = add(totals[0], sum_of_group(terms));
      }
    }
    all = row_sum.of(totals);
    if (centred) break;
    const float mean = divide(all, length);
#pragma unroll
    for (int u = 0; u < kGroups; ++u) subtract_mean(v[u], mean, packs.has_group(u) ? kGroup : 0);
  }
  const RowWeights<T, kGroups> bias = biases();
  const float factor = norm_factor(all, length, norm.eps);
#pragma unroll
  for (int u = 0; u < kGroups; ++u) {
    if (!packs.has_group(u)) continue;
    float other[kGroup];
    weights.get(u, other);
    scale(v[u], factor, other, norm.weight_offset);
    if (bias) {
      bias.get(u, other);
#pragma unroll
      for (int k = 0; k < kGroup; ++k) v[u][k] = add(v[u][k], other[k]);
    }
  }
}

// Each row is a block's. Each thread reads back only what it has itself written.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(kMostSlots) norm_kernel(const __grid_constant__ NormMessage m) {
  __shared__ RowSumRoom room;
  const int64_t hidden = m.hidden, groups = row_groups(hidden);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * hidden;
  const auto row = [&](const void* array) { return static_cast<const typename T::Bits*>(array) + first; };
  const auto row_of = [&](void* array) { return static_cast<typename T::Bits*>(array) + first; };
  RowSum<1> sum(room);
  float v[kGroup], other[kGroup];
  float total[1] = {0.0f};
  // The total of what each group adds, in their order.
  const auto each_group = [&](auto&& value) {
    for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) {
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
  const float first_sum = each_group([&](int64_t g) {
    load_group<T, kWhole>(row(m.sums), hidden, g, v);
    load_group<T, kWhole>(row(m.residual), hidden, g, other);
    add_residual<T>(v, other);
    store_group<T, kWhole>(row_of(m.new_residual), hidden, g, v);
    return m.norm.layer ? sum_of_group(v) : sum_of_squares(v);
  });
  const float mean = m.norm.layer ? divide(first_sum, m.length) : 0.0f;
  const auto reload = [&](int64_t g) {
    load_group<T, kWhole>(row(m.new_residual), hidden, g, v);
    if (m.norm.layer) subtract_mean(v, mean, present(hidden, g));
  };
  const float squares = !m.norm.layer ? first_sum : each_group([&](int64_t g) {
    reload(g);
    return sum_of_squares(v);
  });
  const float factor = norm_factor(squares, m.length, m.norm.eps);
  for (int64_t g = threadIdx.x; g < groups; g += blockDim.x) {
    reload(g);
    load_weights<T, kWhole>(m.weight, hidden, g, other);
    scale(v, factor, other, m.norm.weight_offset);
    if (m.bias.data != nullptr) {
      load_weights<T, kWhole>(m.bias, hidden, g, other);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) v[i] = add(v[i], other[i]);
    }
    store_group<T, kWhole>(row_of(m.normed), hidden, g, v);
  }
}

}  // namespace sgl_comm::device
