// Running a function on several threads, and dividing elements among them. The threads are OpenMP's where the build has
// it, else std::thread's (also under ThreadSanitizer, which cannot see into OpenMP's runtime).
#pragma once

#include <stdint.h>

#if !defined(_OPENMP)
#include <thread>
#include <vector>
#endif

namespace feather {

// How many of the `wanted` threads to use: 1 below `minimum` elements, where waking threads costs more than the work,
// and 1 in a forked child, which would wait forever for OpenMP's threads, since they do not survive a fork.
int usable_threads(int wanted, int64_t elements, int64_t minimum);

// Calls f(index) for each index in [0, threads), each on a thread of its own, and waits for all. f must not throw.
template <class F>
void run_on_threads(int threads, const F& f) {
  if (threads <= 1) {
    f(0);
    return;
  }
#if defined(_OPENMP)
#pragma omp parallel for schedule(static, 1) num_threads(threads)
  for (int index = 0; index < threads; ++index) f(index);
#else
  std::vector<std::thread> others;
  for (int index = 1; index < threads; ++index) others.emplace_back([&f, index] { f(index); });
  f(0);
  for (std::thread& other : others) other.join();
#endif
}

struct Range {
  int64_t begin;
  int64_t end;
};

// Part `index` of [0, n) cut into `parts`. Cuts are at multiples of 64 elements, so that two threads never write to the
// same cache line of an array that starts at one, whatever the dtype.
inline Range part_of(int64_t n, int index, int parts) {
  constexpr int64_t kAligned = 64;
  const int64_t blocks = (n + kAligned - 1) / kAligned;
  const int64_t begin = blocks / parts * index + (blocks % parts) * index / parts;
  const int64_t end = blocks / parts * (index + 1) + (blocks % parts) * (index + 1) / parts;
  return Range{begin * kAligned < n ? begin * kAligned : n, end * kAligned < n ? end * kAligned : n};
}

}  // namespace feather
