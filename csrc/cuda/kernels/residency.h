// The kernels that a group may launch, and how many blocks of each can be on a device at once. A launch that waits for
// its peers must fit as a whole.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "cuda/cuda_check.h"

namespace sgl_comm::cuda {

// Kernels of one kind are launched alike, and the one that needs the most of a multiprocessor counts for all. A
// multiprocessor holds one block of 512 threads of kRows, and two of kDenseRows. Blocks of kWaitsForNobody
// need not fit at once.
enum class KernelKind {
  kOneShot,
  kStrided,
  kTwoShot,
  kGather,
  kRing,
  kPull,
  kRows,
  kDenseRows,
  kBroadcast,
  kWaitsForNobody,
};
constexpr int kNumWaitingKinds = static_cast<int>(KernelKind::kWaitsForNobody);

class KernelTable {
 public:
  struct Entry {
    KernelKind kind;
    const void* kernel;
    unsigned most_clustered;  // it is launched in clusters of up to so many blocks
  };

  template <typename Kernel>
  void add(KernelKind kind, Kernel* kernel, unsigned most_clustered = 1) {
    entries_.push_back({kind, reinterpret_cast<const void*>(kernel), most_clustered});
  }
  const std::vector<Entry>& entries() const { return entries_; }

 private:
  std::vector<Entry> entries_;
};

// The shape of a launch. Grid and block are functions of the message and of limits agreed at init, so that every rank
// maps packs alike (except where a one-shot's tensor is strided, one_shot.cu).
struct Shape {
  unsigned blocks;
  unsigned threads;
  unsigned cluster = 1;  // blocks that share a row
};

struct Residency {
  static constexpr int kThreads[] = {64, 128, 256, 512};
  static constexpr unsigned kClusters[] = {1, 2, 4};
  static constexpr int kNumSizes = sizeof kThreads / sizeof *kThreads;
  static constexpr int kNumClusters = sizeof kClusters / sizeof *kClusters;

  int blocks[kNumWaitingKinds][kNumClusters][kNumSizes];
  int ranks = 1;                 // that share a device
  bool dependent_launch = true;  // the kernels that run here were compiled for what came with Hopper: to wait for the
                                 // kernel before, and to be launched in clusters

  Residency() { std::fill_n(&blocks[0][0][0], kNumWaitingKinds * kNumClusters * kNumSizes, INT_MAX); }

  // Loads every kernel of the table on the current device, and counts how many blocks of each kind fit on it at once.
  static Residency load(const KernelTable& table) {
    Residency residency;
    for (const KernelTable::Entry& entry : table.entries()) residency.add(entry);
    return residency;
  }

  // Lowers the limits to those of another rank where it has lower ones.
  void lower_to(const Residency& other) {
    dependent_launch &= other.dependent_launch;
    for (int k = 0; k < kNumWaitingKinds; ++k) {
      for (int c = 0; c < kNumClusters; ++c) {
        for (int s = 0; s < kNumSizes; ++s) blocks[k][c][s] = std::min(blocks[k][c][s], other.blocks[k][c][s]);
      }
    }
  }

  void share(int with) { ranks = with; }

  // How many blocks of so many threads, at most the last of kThreads, a launch may have: at most half of what fits on a
  // device, so that the next launch, which already waits, fits beside it; divided by the ranks that share the device.
  // If a launch lets the next begin only at its end (late), none waits beside it, but it may itself wait beside one
  // that does not: of r ranks' launches all but one may be doubled.
  int most_blocks(KernelKind kind, unsigned threads, unsigned cluster = 1, bool late = false) const {
    const int* size = std::lower_bound(kThreads, kThreads + kNumSizes - 1, static_cast<int>(threads));
    const unsigned* clustered = std::lower_bound(kClusters, kClusters + kNumClusters - 1, cluster);
    const int all = blocks[static_cast<int>(kind)][clustered - kClusters][size - kThreads];
    return std::max(1, all / (2 * std::max(1, late ? ranks - 1 : ranks)));
  }

  // As many blocks of `threads` as `work` threads need, or fewer that all go as many rounds.
  Shape shape(KernelKind kind, int64_t work, unsigned threads, int64_t most = INT_MAX) const {
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
  // Asking for a kernel's attributes is what loads it.
  void add(const KernelTable::Entry& entry) {
    cudaFuncAttributes attributes{};
    SGL_CUDA_CHECK("init", cudaFuncGetAttributes(&attributes, entry.kernel));
    if (entry.kind == KernelKind::kWaitsForNobody) return;
    dependent_launch &= attributes.ptxVersion >= 90;
    for (int c = 0; c < kNumClusters && kClusters[c] <= entry.most_clustered; ++c) {
      for (int s = 0; s < kNumSizes; ++s) {
        int& fewest = blocks[static_cast<int>(entry.kind)][c][s];
        fewest = std::min(fewest, blocks_that_fit(entry.kernel, kClusters[c], kThreads[s]));
      }
    }
  }

  static int blocks_that_fit(const void* kernel, unsigned cluster, int threads) {
    int fit = 0;
    if (cluster == 1) {
      int device = 0, processors = 0;
      SGL_CUDA_CHECK("init", cudaGetDevice(&device));
      SGL_CUDA_CHECK("init", cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
      SGL_CUDA_CHECK("init", cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, threads, 0));
      return fit * processors;
    }
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {cluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = cluster;
    config.blockDim = threads;
    config.attrs = &attribute;
    config.numAttrs = 1;
    if (cudaOccupancyMaxActiveClusters(&fit, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // a device without clusters
      fit = 0;
    }
    return fit * static_cast<int>(cluster);
  }
};

}  // namespace sgl_comm::cuda
