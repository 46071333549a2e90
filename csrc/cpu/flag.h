// A counter in shared memory that one rank raises and its peers wait for: the CPU's only signal.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sgl_comm {

inline void spin_pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb" ::: "memory");
#endif
}

// Before raise(e): the rank has written everything that epoch e promises. After reached(e) is true: a peer sees it
// all (release in raise, acquire in reached). A peer that has waited long sleeps on the counter's low half, which
// changes with every raise as long as a raise is by less than 2^32; so a flag starts where the epochs do.
class alignas(64) Flag {
 public:
  // Before anybody raises it or waits.
  void start_at(uint64_t epoch) { value_.store(epoch, std::memory_order_relaxed); }

  bool reached(uint64_t epoch) const { return value_.load(std::memory_order_acquire) >= epoch; }

  void raise(uint64_t epoch) {
    value_.store(epoch, std::memory_order_seq_cst);  // seq_cst: before the look at sleepers_, as theirs before value_
    if (sleepers_.load(std::memory_order_seq_cst) != 0) wake();
  }

  void wake() { syscall(SYS_futex, low_half(), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

  // Sleeps until the flag changes, `nanoseconds` have passed, or wake(); may return early.
  void sleep_below(uint64_t epoch, int64_t nanoseconds) {
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    const uint64_t seen = value_.load(std::memory_order_seq_cst);
    if (seen < epoch) {
      const timespec limit{nanoseconds / 1000000000, nanoseconds % 1000000000};
      syscall(SYS_futex, low_half(), FUTEX_WAIT, static_cast<uint32_t>(seen), &limit, nullptr, 0);
    }
    sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  uint32_t* low_half() {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the futex word is the counter's first four bytes");
    return reinterpret_cast<uint32_t*>(&value_);
  }

  std::atomic<uint64_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

}  // namespace sgl_comm
