// How many blocks of a kernel can be on a device at once. A launch that waits for its peers must fit as a whole.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>

#include "cuda/cuda_check.h"

namespace sgl_comm::cuda {

// Kernels of one kind are launched alike; the greediest of a kind counts for all. Of blocks of 512 threads a
// multiprocessor has room for one with kRows, and for two with kDenseRows.
enum class Kind { kOneShot, kStrided, kTwoShot, kGather, kRing, kPull, kRows, kDenseRows, kBroadcast };

// Grid and block are functions of the message and of limits agreed at init, so that every rank maps packs alike (but
// where a one-shot's tensor is strided, one_shot.cuh).
struct Shape {
  unsigned blocks;
  unsigned threads;
  unsigned cluster = 1;  // blocks that share a row
};

struct Residency {
  static constexpr int kKinds = 9, kSizes = 4, kClusters = 3;
  static constexpr int kThreads[kSizes] = {64, 128, 256, 512};
  int blocks[kKinds][kClusters][kSizes];  // in clusters of 1, 2 and 4
  int ranks = 1;                          // that share a device
  bool dependent_launch = true;  // the kernels that run here were compiled for what came with Hopper: to wait for the
                                 // kernel before, and to be launched in clusters

  Residency() { std::fill_n(&blocks[0][0][0], kKinds * kClusters * kSizes, INT_MAX); }

  // Takes a kernel in that is launched in clusters of up to so many blocks, on the current device. Asking is what loads
  // it.
  void add(Kind kind, const void* kernel, unsigned most_clustered = 1) {
    for (unsigned cluster = 1; cluster <= most_clustered; cluster *= 2) add_clustered(kind, kernel, cluster);
    cudaFuncAttributes attributes{};
    SGL_CUDA_CHECK("init", cudaFuncGetAttributes(&attributes, kernel));
    dependent_launch &= attributes.ptxVersion >= 90;
  }

  // The fewest of all ranks.
  void lower_to(const Residency& other) {
    dependent_launch &= other.dependent_launch;
    for (int k = 0; k < kKinds; ++k) {
      for (int c = 0; c < kClusters; ++c) {
        for (int s = 0; s < kSizes; ++s) blocks[k][c][s] = std::min(blocks[k][c][s], other.blocks[k][c][s]);
      }
    }
  }

  void share(int with) { ranks = with; }

  // How many blocks of so many threads, at most the last of kThreads, a launch may have: half a device's at most, so
  // that the next one, which already waits, fits beside it; and so for all ranks at once. If a launch lets the next
  // begin only at its end (late), none waits beside it, but it may itself wait beside one that does not: of r ranks'
  // launches all but one may be doubled.
  int most_blocks(Kind kind, unsigned threads, unsigned cluster = 1, bool late = false) const {
    const int* size = std::lower_bound(kThreads, kThreads + kSizes - 1, static_cast<int>(threads));
    const int all = blocks[static_cast<int>(kind)][index_of(cluster)][size - kThreads];
    return std::max(1, all / (2 * std::max(1, late ? ranks - 1 : ranks)));
  }

  // As many blocks of `threads` as `work` threads need, or fewer that all go as many rounds.
  Shape shape(Kind kind, int64_t work, unsigned threads, int64_t most = INT_MAX) const {
    const int64_t limit = std::min<int64_t>(most, most_blocks(kind, threads));
    const int64_t wanted = std::max<int64_t>(1, (work + threads - 1) / threads);
    return {evenly(wanted, limit), threads};
  }

  // The fewest that do `wanted` in as many rounds as `most` would.
  static unsigned evenly(int64_t wanted, int64_t most) {
    const int64_t rounds = (wanted + most - 1) / most;
    return static_cast<unsigned>((wanted + rounds - 1) / rounds);
  }

 private:
  static int index_of(unsigned cluster) { return cluster == 4 ? 2 : cluster == 2 ? 1 : 0; }

  void add_clustered(Kind kind, const void* kernel, unsigned cluster) {
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
      int& fewest = blocks[static_cast<int>(kind)][index_of(cluster)][size];
      fewest = std::min(fewest, fit);
    }
  }
};

}  // namespace sgl_comm::cuda
