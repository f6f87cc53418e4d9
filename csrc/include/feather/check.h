// Argument checks of host code: an exception that says what was wrong.
#pragma once

#include <math.h>

#include <sstream>
#include <stdexcept>

namespace feather {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace feather

// Throws std::invalid_argument, which Python sees as ValueError, with the parts after the condition as its message.
#define FEATHER_CHECK(condition, ...)               \
  do {                                              \
    if (!(condition)) ::feather::fail(__VA_ARGS__); \
  } while (false)

namespace feather {

// The index of a power's kernels: 1, 2, 3, or kInfinitePower (math.h) = 0 for infinity.
inline int power_index(double p) {
  FEATHER_CHECK(p == 1 || p == 2 || p == 3 || p == INFINITY, "power must be 1, 2, 3 or inf, got ", p);
  return p == INFINITY ? 0 : static_cast<int>(p);
}

}  // namespace feather
