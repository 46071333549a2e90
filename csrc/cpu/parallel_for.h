// Large work on host memory, part by part, by threads of its own.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace sgl_comm::cpu {

// Runs work(part) for each of so many parts. Large work gets several threads, however many torch has: the model and the
// other system wait for it.
template <typename Work>
void for_each_part(size_t num_parts, size_t parts_a_thread, const Work& work) {
  constexpr size_t kMostThreads = 8;
  cpu_set_t cores{};
  sched_getaffinity(0, sizeof cores, &cores);
  const size_t allowed = std::clamp<size_t>(CPU_COUNT(&cores), 1, kMostThreads);
  const size_t num_threads = std::clamp<size_t>(num_parts / parts_a_thread, 1, allowed);
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t part = next++; part < num_parts; part = next++) work(part);
  };
  std::vector<std::thread> others;
  others.reserve(num_threads);
  try {
    while (others.size() + 1 < num_threads) others.emplace_back(run);
  } catch (const std::system_error&) {  // no more threads to be had: fewer do it
  }
  run();
  for (std::thread& other : others) other.join();
}

inline void copy_bytes(const std::byte* from, std::byte* to, size_t bytes) {
  constexpr size_t kPart = 256 << 10, kPartsAThread = 8;
  for_each_part((bytes + kPart - 1) / kPart, kPartsAThread, [&](size_t part) {
    std::memcpy(to + part * kPart, from + part * kPart, std::min(kPart, bytes - part * kPart));
  });
}

}  // namespace sgl_comm::cpu
