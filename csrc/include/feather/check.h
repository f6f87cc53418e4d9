// Argument checks of host code: an exception that says what was wrong.
#pragma once

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
#define FEATHER_CHECK(condition, ...)            \
  do {                                           \
    if (!(condition)) ::feather::fail(__VA_ARGS__); \
  } while (false)
