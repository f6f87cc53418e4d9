#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>

namespace feather {
namespace {

std::atomic<bool> forked{false};

// Set up when the library is loaded, before it has started a thread.
const int registered = pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });

}  // namespace

int usable_threads(int wanted, int64_t elements, int64_t minimum) {
  static_cast<void>(registered);
  if (wanted <= 1 || elements < minimum || forked.load(std::memory_order_relaxed)) return 1;
  return wanted;
}

}  // namespace feather
