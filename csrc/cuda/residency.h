// How many blocks of a kernel can be on a device at once. A launch that waits for its peers must fit as a whole.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>

#include "cuda/cuda_check.h"

namespace sgl_comm::cuda {

// Kernels of one kind are launched alike; the greediest of a kind counts for all.
enum class Kind { kOneShot, kTwoShot, kGather, kRing, kPull, kRows, kRowsBy2, kRowsBy4, kRowsBy8 };
inline Kind rows_by(unsigned cluster) {
  return cluster == 8 ? Kind::kRowsBy8 : cluster == 4 ? Kind::kRowsBy4 : cluster == 2 ? Kind::kRowsBy2 : Kind::kRows;
}

// Grid and block are functions of the message and of limits agreed at init, so that every rank maps packs alike.
struct Shape {
  unsigned blocks;
  unsigned threads;
  unsigned cluster = 1;  // blocks that share a row
};

struct Residency {
  static constexpr int kKinds = 9, kSizes = 4;
  static constexpr int kThreads[kSizes] = {64, 128, 256, 512};
  int blocks[kKinds][kSizes];
  bool dependent_launch = true;  // the kernels that this device runs were compiled to wait for the one before

  Residency() {
    for (auto& kind : blocks) std::fill_n(kind, kSizes, INT_MAX);
  }

  // Takes a kernel in, on the current device. Asking is what loads it.
  void add(Kind kind, const void* kernel, unsigned cluster = 1) {
    int device = 0, processors = 0;
    SGL_CUDA_CHECK("init", cudaGetDevice(&device));
    SGL_CUDA_CHECK("init", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    for (int size = 0; size < kSizes; ++size) {
      int fit = 0;
      if (cluster == 1) {
        SGL_CUDA_CHECK("init", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, kThreads[size], 0));
        fit *= processors;
      } else {
        cudaLaunchAttribute attribute{};
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {cluster, 1, 1};
        cudaLaunchConfig_t config{};
        config.gridDim = cluster;
        config.blockDim = kThreads[size];
        config.attrs = &attribute;
        config.numAttrs = 1;
        if (cudaOccupancyMaxActiveClusters(&fit, kernel, &config) != cudaSuccess) {
          cudaGetLastError();  // a device without clusters
          fit = 0;
        }
        fit *= static_cast<int>(cluster);
      }
      int& fewest = blocks[static_cast<int>(kind)][size];
      fewest = std::min(fewest, fit);
    }
    cudaFuncAttributes attributes{};
    SGL_CUDA_CHECK("init", cudaFuncGetAttributes(&attributes, kernel));
    dependent_launch &= attributes.ptxVersion >= 90;
  }

  // The fewest of all ranks.
  void lower_to(const Residency& other) {
    for (int k = 0; k < kKinds; ++k) {
      for (int s = 0; s < kSizes; ++s) blocks[k][s] = std::min(blocks[k][s], other.blocks[k][s]);
    }
  }

  // `ranks` share a device, and each may have the next launch waiting beside the present one.
  void share(int ranks) {
    for (auto& kind : blocks) {
      for (int& count : kind) count = std::max(1, count / (2 * ranks));
    }
  }

  // How many blocks of so many threads fit; at most the last of kThreads.
  int most_blocks(Kind kind, unsigned threads) const {
    const int* size = std::lower_bound(kThreads, kThreads + kSizes - 1, static_cast<int>(threads));
    return blocks[static_cast<int>(kind)][size - kThreads];
  }

  // As many blocks of `threads` as `work` threads need, or fewer that all go as many rounds.
  Shape shape(Kind kind, int64_t work, unsigned threads, int64_t most = INT_MAX) const {
    const int64_t limit = std::min<int64_t>(most, most_blocks(kind, threads));
    const int64_t wanted = std::max<int64_t>(1, (work + threads - 1) / threads);
    const int64_t rounds = (wanted + limit - 1) / limit;
    return {static_cast<unsigned>((wanted + rounds - 1) / rounds), threads};
  }
};

}  // namespace sgl_comm::cuda
