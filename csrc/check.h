// Errors: SGL_CHECK(condition, parts...) throws a std::runtime_error, which torch turns into a Python RuntimeError.
// The text begins with the op's name and says what was got and what was expected.
#pragma once

#include <sstream>
#include <stdexcept>

namespace sgl_comm {

template <typename... Parts>
[[noreturn]] __attribute__((cold, noinline)) void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

}  // namespace sgl_comm

#define SGL_CHECK(condition, ...)                  \
  do {                                             \
    if (__builtin_expect(!(condition), 0)) {       \
      ::sgl_comm::fail("sgl_comm::", __VA_ARGS__); \
    }                                              \
  } while (false)
