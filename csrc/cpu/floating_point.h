// The CPU's floating-point modes, which a thread may have changed (torch.set_flush_denormal).
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sgl_comm {

// While it lives: round to nearest even and keep subnormals.
class DefaultFloatingPoint {
 public:
#if defined(__x86_64__)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) {
    if (saved_ & kChanged) _mm_setcsr(saved_ & ~kChanged);
  }
  ~DefaultFloatingPoint() {
    if (saved_ & kChanged) _mm_setcsr(saved_);
  }

 private:
  static constexpr unsigned kChanged = 0xe040;  // flush to zero, rounding mode, denormals are zero
  unsigned saved_;
#elif defined(__aarch64__)
  DefaultFloatingPoint() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    if (saved_ != 0) asm volatile("msr fpcr, xzr");
  }
  ~DefaultFloatingPoint() {
    if (saved_ != 0) asm volatile("msr fpcr, %0" ::"r"(saved_));
  }

 private:
  uint64_t saved_;
#else
  DefaultFloatingPoint() = default;
#endif
};

}  // namespace sgl_comm
