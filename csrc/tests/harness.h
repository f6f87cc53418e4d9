// A minimal test harness: CHECK, CHECK_REFUSED and run_all. A test is a function without arguments. The first failed
// check prints its place and values, and ends the program with exit status 1.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>

namespace feather_tests {

[[noreturn]] inline void report(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
  std::exit(1);
}

// The parts, joined.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  stream.precision(17);
  (stream << ... << parts);
  return stream.str();
}

struct Test {
  const char* name;
  void (*run)();
};

// Runs tests in order; returns the exit status of the program.
template <size_t N>
int run_all(const Test (&tests)[N]) {
  for (const Test& test : tests) {
    std::printf("%s\n", test.name);
    std::fflush(stdout);
    test.run();
  }
  std::printf("%zu passed, 0 failed\n", N);
  return 0;
}

}  // namespace feather_tests

// The condition must hold; the other arguments are the parts of the message if it does not.
#define CHECK(condition, ...)                                                                                  \
  do {                                                                                                         \
    if (!(condition))                                                                                          \
      ::feather_tests::report(__FILE__, __LINE__, ::feather_tests::text("not " #condition ": ", __VA_ARGS__)); \
  } while (false)

// The expression must throw a std::invalid_argument whose message contains `words`.
#define CHECK_REFUSED(expression, words)                                                              \
  do {                                                                                                \
    std::string message = "nothing";                                                                  \
    try {                                                                                             \
      expression;                                                                                     \
    } catch (const std::invalid_argument& error) {                                                    \
      message = error.what();                                                                         \
    }                                                                                                 \
    CHECK(message.find(words) != std::string::npos, "expected \"", words, "\" in \"", message, "\""); \
  } while (false)
