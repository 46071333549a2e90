// Which algorithm for this message: pure functions of numbers that all ranks share.
#pragma once

#include <cstdint>
#include <string>

#include "check.h"

namespace sgl_comm {

// One-shot: all to all, each sums everything. Two-shot: each sums a part and sends the sum to all. A ring is one of
// these in tiles, for a message that the workspace cannot hold at once, or that goes faster so.
enum class Algorithm { kOneShot, kTwoShot, kOneShotRing, kTwoShotRing };

constexpr const char* kAlgorithmNames[] = {"one_shot", "two_shot", "one_shot_ring", "two_shot_ring"};
inline const char* name_of(Algorithm algorithm) { return kAlgorithmNames[static_cast<int>(algorithm)]; }

// From sgl_comm/backends/thresholds.py.
struct Thresholds {
  int64_t one_shot_bytes;  // the largest message that goes by one-shot
  int64_t ring_bytes;      // above it a ring is faster, though the workspace may hold the message at once
  int64_t fallback_bytes;  // above it the group's own backend serves; INT64_MAX where results must not depend on it
  bool operator==(const Thresholds& other) const {
    return one_shot_bytes == other.one_shot_bytes && ring_bytes == other.ring_bytes &&
           fallback_bytes == other.fallback_bytes;
  }
};

constexpr int64_t kPolicyPackBytes = 16;

inline int64_t packs_of(int64_t bytes) { return (bytes + kPolicyPackBytes - 1) / kPolicyPackBytes; }

// Packs of the largest shard of a message that `world` ranks share out.
inline int64_t shard_packs_of(int64_t bytes, int world) { return (packs_of(bytes) + world - 1) / world; }

inline bool fits(Algorithm algorithm, int64_t bytes, int world, int64_t buffer_bytes) {
  const int64_t packs = algorithm == Algorithm::kOneShot ? packs_of(bytes) : 2 * shard_packs_of(bytes, world);
  return packs * (world - 1) <= buffer_bytes / kPolicyPackBytes;
}

// An error unless `wish` is "auto" or the name of an algorithm.
inline void check_algorithm(const char* op, const std::string& wish) {
  bool known = wish == "auto";
  for (const char* name : kAlgorithmNames) known = known || wish == name;
  SGL_CHECK(known, op, ": got algo '", wish, "'; expected auto, one_shot, two_shot, one_shot_ring or two_shot_ring");
}

// The algorithm for a message of so many bytes, where a buffer of the workspace has buffer_bytes. `wish` is "auto" or
// an algorithm's name; one_shot and two_shot become a ring where the message does not fit.
inline Algorithm choose(const char* op, const std::string& wish, int64_t bytes, int world, int64_t buffer_bytes,
                        const Thresholds& thresholds) {
  check_algorithm(op, wish);
  for (const Algorithm ring : {Algorithm::kOneShotRing, Algorithm::kTwoShotRing}) {
    if (wish == name_of(ring)) return ring;
  }
  const bool one_shot = wish == "one_shot" || (wish == "auto" && bytes <= thresholds.one_shot_bytes);
  const Algorithm plain = one_shot ? Algorithm::kOneShot : Algorithm::kTwoShot;
  const bool at_once = wish != "auto" || bytes <= thresholds.ring_bytes;
  if (at_once && fits(plain, bytes, world, buffer_bytes)) return plain;
  return one_shot ? Algorithm::kOneShotRing : Algorithm::kTwoShotRing;
}

// Whether one launch that walks a tensor's strides is faster than a launch for row-major memory and a copy before or
// after it: of so many units, of which runs of so many bytes lie side by side (benchmarks/bench_cfg_all_reduce.py).
inline bool walk_pays(int64_t units, int64_t run_bytes) {
  constexpr int64_t kSectorBytes = 32, kMostScattered = 128 << 10, kMostInRuns = 2 << 20;
  return units <= (run_bytes < kSectorBytes ? kMostScattered : kMostInRuns);
}

}  // namespace sgl_comm
