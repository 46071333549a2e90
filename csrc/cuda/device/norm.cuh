// RMSNorm and LayerNorm of rows with norm.h's arithmetic. The threads of a block, or of a cluster of blocks, work on
// one row at a time.
#pragma once

#include "cuda/device/pack.cuh"
#include "cuda/device/parameters.h"
#include "cuda/device/row_sum.cuh"
#include "norm.h"

namespace sgl_comm::device {

template <typename T>
constexpr int kVectorPacks = kVector / T::kLanes;

// Loads a vector of a row-major row of `hidden` elements, as fp32; zeros beyond its end. kAligned as in pack.cuh.
template <typename T, bool kAligned>
__device__ __forceinline__ void load_vector(const void* row, int64_t hidden, int64_t vector, float (&v)[kVector]) {
#pragma unroll
  for (int q = 0; q < kVectorPacks<T>; ++q) {
    float lanes[T::kLanes];
    T::unpack(load_pack<T, kAligned>(row, hidden, vector * kVectorPacks<T> + q), lanes);
#pragma unroll
    for (int i = 0; i < T::kLanes; ++i) v[q * T::kLanes + i] = lanes[i];
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void store_vector(void* row, int64_t hidden, int64_t vector, const float (&v)[kVector]) {
#pragma unroll
  for (int q = 0; q < kVectorPacks<T>; ++q) {
    float lanes[T::kLanes];
#pragma unroll
    for (int i = 0; i < T::kLanes; ++i) lanes[i] = v[q * T::kLanes + i];
    store_pack<T, kAligned>(row, hidden, vector * kVectorPacks<T> + q, T::pack(lanes));
  }
}

template <typename T, bool kAligned>
__device__ __forceinline__ void load_weights(const Weights& weights, int64_t hidden, int64_t vector,
                                             float (&v)[kVector]) {
  if (weights.wide) {
    load_vector<Float32, kAligned>(weights.data, hidden, vector, v);
  } else {
    load_vector<T, kAligned>(weights.data, hidden, vector, v);
  }
}

// Rounds to the dtype and back.
template <typename T>
__device__ __forceinline__ void round_to(float (&v)[kVector]) {
#pragma unroll
  for (int q = 0; q < kVectorPacks<T>; ++q) {
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
__device__ __forceinline__ void add_residual(float (&v)[kVector], const float (&residual)[kVector]) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = add(v[i], residual[i]);
  round_to<T>(v);
}

// How many elements of a vector lie within the row.
__device__ __forceinline__ int present(int64_t hidden, int64_t vector) {
  const int64_t left = hidden - vector * kVector;
  return left < kVector ? static_cast<int>(left) : kVector;
}

__device__ __forceinline__ void subtract_mean(float (&v)[kVector], float mean, int count) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = i < count ? add(v[i], -mean) : 0.0f;
}

__device__ __forceinline__ float sum_of_squares(const float (&v)[kVector]) {
  float squares[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) squares[i] = mul(v[i], v[i]);
  return sum_of_vector(squares);
}

__device__ __forceinline__ void scale(float (&v)[kVector], float factor, const float (&weight)[kVector], float offset) {
#pragma unroll
  for (int i = 0; i < kVector; ++i) v[i] = normalised(v[i], factor, add(weight[i], offset));
}

// Which packs of a row-major array of rows are this thread's: in each row those of at most kVectors vectors, which go
// into its partial sums.
template <typename T, int kVectors>
class RowPacks {
 public:
  static constexpr int kCount = kVectors * kVectorPacks<T>;  // of a row
  using Array = uint4[kCount];

  // hidden: a multiple of kVector.
  template <int kPartials>
  __device__ __forceinline__ RowPacks(const RowSum<kPartials>& sum, int hidden)
      : first_partial_(sum.first_partial()), threads_(sum.num_threads()), vectors_(hidden / kVector) {}

  __device__ __forceinline__ int hidden() const { return vectors_ * kVector; }
  __device__ __forceinline__ int of_row() const { return vectors_ * kVectorPacks<T>; }
  __device__ __forceinline__ int vector(int u) const { return first_partial_ + u * threads_; }
  __device__ __forceinline__ bool has_vector(int u) const { return vector(u) < vectors_; }

  // Calls visit(n, i) for each of them in a row: the n-th of this thread, which is pack i of the array.
  template <typename Visit>
  __device__ __forceinline__ void each(int row, Visit&& visit) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int u = n / kVectorPacks<T>;
      if (has_vector(u)) visit(n, (row * vectors_ + vector(u)) * kVectorPacks<T> + n % kVectorPacks<T>);
    }
  }
  // Where the first of them is in a row.
  __device__ __forceinline__ const uint4* first(const void* array, int row) const {
    return static_cast<const uint4*>(array) + (row * vectors_ + first_partial_) * kVectorPacks<T>;
  }
  __device__ __forceinline__ void load(const uint4* first, Array& packs) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) {
      const int u = n / kVectorPacks<T>;
      if (has_vector(u)) packs[n] = ptx::load_input(first + u * threads_ * kVectorPacks<T> + n % kVectorPacks<T>);
    }
  }
  __device__ __forceinline__ void load(const void* array, int row, Array& packs) const {
    load(first(array, row), packs);
  }
  __device__ __forceinline__ void copy(const Array& from, Array& to) const {
#pragma unroll
    for (int n = 0; n < kCount; ++n) to[n] = from[n];
  }
  // Unpacks this thread's n-th pack into its lanes of `v`.
  __device__ __forceinline__ void widen(uint4 pack, int n, float (&v)[kVectors][kVector]) const {
    float lanes[T::kLanes];
    T::unpack(pack, lanes);
#pragma unroll
    for (int k = 0; k < T::kLanes; ++k) v[n / kVectorPacks<T>][n % kVectorPacks<T> * T::kLanes + k] = lanes[k];
  }
  __device__ __forceinline__ void store(void* array, int row, const float (&v)[kVectors][kVector]) const {
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      if (has_vector(u)) store_vector<T, true>(static_cast<uint4*>(array) + row * of_row(), hidden(), vector(u), v[u]);
    }
  }

 private:
  const int first_partial_, threads_, vectors_;
};

// The weights or the biases of a thread's vectors, as they are in memory: what is asked for early is unpacked late.
template <typename T, int kVectors>
class RowWeights {
 public:
  __device__ __forceinline__ RowWeights(const RowPacks<T, kVectors>& packs, const Weights& weights)
      : wide_(kVectorPacks<T> == kWidePacks || weights.wide), any_(weights.data != nullptr) {
    if (!any_) return;
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      const uint4* const first = static_cast<const uint4*>(weights.data) + packs.vector(u) * (wide_ ? kWidePacks : 1);
      if (!packs.has_vector(u)) continue;
      packs_[u][0] = ptx::load_input(first);
      if (wide_) packs_[u][1] = ptx::load_input(first + 1);
    }
  }
  __device__ __forceinline__ explicit operator bool() const { return any_; }

  __device__ __forceinline__ void get(int u, float (&v)[kVector]) const {
    float lanes[Float32::kLanes];
    if (wide_) {
#pragma unroll
      for (int q = 0; q < kWidePacks; ++q) {
        Float32::unpack(packs_[u][q], lanes);
#pragma unroll
        for (int k = 0; k < Float32::kLanes; ++k) v[q * Float32::kLanes + k] = lanes[k];
      }
    } else if constexpr (T::kLanes == kVector) {
      T::unpack(packs_[u][0], v);
    }
  }

 private:
  static constexpr int kWidePacks = kVectorPacks<Float32>;

  uint4 packs_[kVectors][kWidePacks];
  const bool wide_, any_;
};

// The norm of a row, in place. Each thread has some vectors `v` of it, which go into one partial sum or into one each;
// beyond the end of the row `v` is 0. biases() gives the biases when they are needed. Needs all threads of the row.
template <typename T, int kVectors, int kPartials, typename Biases>
__device__ __forceinline__ void normalise(float (&v)[kVectors][kVector], const RowPacks<T, kVectors>& packs,
                                          const RowWeights<T, kVectors>& weights, Biases&& biases, const Norm& norm,
                                          RowLength length, RowSum<kPartials>& row_sum) {
  static_assert(kPartials == 1 || kPartials == kVectors);
  float all;
#pragma unroll 1
  for (bool centred = !norm.layer;; centred = true) {
    float totals[kPartials];
#pragma unroll
    for (int u = 0; u < kVectors; ++u) {
      float terms[kVector];
#pragma unroll
      for (int k = 0; k < kVector; ++k) terms[k] = centred ? mul(v[u][k], v[u][k]) : v[u][k];
      if (u < kPartials) {
        totals[u] = sum_of_vector(terms);
      } else if (packs.has_vector(u)) {
        totals[0] = add(totals[0], sum_of_vector(terms));
      }
    }
    all = row_sum.of(totals);
    if (centred) break;
    const float mean = divide(all, length);
#pragma unroll
    for (int u = 0; u < kVectors; ++u) subtract_mean(v[u], mean, packs.has_vector(u) ? kVector : 0);
  }
  const RowWeights<T, kVectors> bias = biases();
  const float factor = norm_factor(all, length, norm.eps);
#pragma unroll
  for (int u = 0; u < kVectors; ++u) {
    if (!packs.has_vector(u)) continue;
    float other[kVector];
    weights.get(u, other);
    scale(v[u], factor, other, norm.weight_offset);
    if (bias) {
      bias.get(u, other);
#pragma unroll
      for (int k = 0; k < kVector; ++k) v[u][k] = add(v[u][k], other[k]);
    }
  }
}

}  // namespace sgl_comm::device
