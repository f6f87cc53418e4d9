// Argument checks in host code: FEATHER_CHECK, fail, and the index of a power.
#pragma once

#include <math.h>

#include <sstream>
#include <stdexcept>

namespace feather {

// Throws std::invalid_argument, which Python sees as ValueError. The message is the parts, joined.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

}  // namespace feather

// Fails with the parts after the condition as the message unless the condition holds.
#define FEATHER_CHECK(condition, ...)               \
  do {                                              \
    if (!(condition)) ::feather::fail(__VA_ARGS__); \
  } while (false)

namespace feather {

// The template argument P of math.h for a power p, which is also its index in kernel tables. Fails unless p is 1, 2, 3
// or infinite.
inline int power_index(double p) {
  FEATHER_CHECK(p == 1 || p == 2 || p == 3 || p == INFINITY, "power must be 1, 2, 3 or inf, got ", p);
  return p == INFINITY ? 0 : static_cast<int>(p);
}

}  // namespace feather
