// Runs the tests named as arguments, or all without arguments. The exit status is 1 if one failed.
#include <stdio.h>
#include <string.h>

#include <chrono>

#include "tests/cuda/arrays.h"
#include "tests/cuda/cuda_on_cpu.h"
#include "tests/cuda/tests.h"

namespace {

struct Test {
  const char* name;
  void (*run)();
};

constexpr Test kTests[] = {{"threshold", feather::test_threshold},
                           {"scale", feather::test_scale},
                           {"select", feather::test_select},
                           {"histogram", feather::test_histogram},
                           {"count", feather::test_count},
                           {"elementwise_once", feather::test_elementwise_once},
                           {"select_once", feather::test_select_once}};

bool is_wanted(const char* name, int arguments, char** values) {
  for (int i = 1; i < arguments; ++i) {
    if (strcmp(values[i], name) == 0) return true;
  }
  return arguments == 1;
}

}  // namespace

int main(int arguments, char** values) {
  for (const Test& test : kTests) {
    if (!is_wanted(test.name, arguments, values)) continue;
    const auto start = std::chrono::steady_clock::now();
    ++cuda_on_cpu::seed;
    const int before = feather::failures;
    test.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    printf("%-16s %s in %.1f s\n", test.name, feather::failures == before ? "passed" : "FAILED", seconds.count());
  }
  return feather::failures == 0 ? 0 : 1;
}
