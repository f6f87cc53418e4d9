// Defines the parts of CUDA C++ that csrc/cuda uses as plain C++, so that g++ or clang++ compiles the kernels for a
// CPU.
//
// Blocks run one after the other. The threads of a block are fibers that switch in random order: at barriers, at warp
// operations and, now and then, at atomics. With CUDA_ON_CPU_THREADS each CUDA thread is a thread of the system and
// several blocks run at once, so that -fsanitize=thread sees races. Shared memory starts out filled with 0xFF (NaN,
// -1). Misuse (a barrier that not all threads reach, a partial warp operation) aborts with "CUDA fault".
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#if defined(CUDA_ON_CPU_THREADS)
#include <pthread.h>

#include <mutex>
#include <thread>
#else
#include <setjmp.h>
#include <ucontext.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define FEATHER_SHARED(type, name, size) auto& name = cuda_on_cpu::shared_memory<type[size]>(__FILE__, __LINE__)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace cuda_on_cpu {

constexpr unsigned kWarp = 32;

[[noreturn]] inline void fail(const char* fault, int line) {
  fprintf(stderr, "CUDA fault: %s (line %d)\n", fault, line);
  abort();
}

struct Index {
  unsigned x;
};

// A barrier for the threads of a block or of a warp, and the line at which they wait.
struct Barrier {
  unsigned size = 0, arrived = 0;
  uint64_t generation = 0;
  int line = 0;
#if defined(CUDA_ON_CPU_THREADS)
  pthread_barrier_t waiting;
#endif
};

struct Warp {
  Barrier barrier;
  uint64_t values[2][kWarp];  // of this exchange, and of the one before, which other lanes may still read
};

struct Block {
  Index index;
  unsigned threads, exited = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<unsigned> exchanges;  // how many each thread has made
  std::map<std::pair<const char*, int>, std::unique_ptr<uint64_t[]>> shared;
#if defined(CUDA_ON_CPU_THREADS)
  std::mutex mutex;
#endif

  Block(unsigned number, unsigned count) : index{number}, threads(count), warps(count / kWarp), exchanges(count) {
    if (count % kWarp != 0) fail("a block must be of whole warps", 0);
    open(barrier, count);
    for (Warp& warp : warps) open(warp.barrier, kWarp);
  }
  ~Block() {
#if defined(CUDA_ON_CPU_THREADS)
    pthread_barrier_destroy(&barrier.waiting);
    for (Warp& warp : warps) pthread_barrier_destroy(&warp.barrier.waiting);
#endif
  }

 private:
  static void open(Barrier& barrier, unsigned size) {
    barrier.size = size;
#if defined(CUDA_ON_CPU_THREADS)
    pthread_barrier_init(&barrier.waiting, nullptr, size);
#endif
  }
};

struct Thread {
  Block* block;
  Index index;
};

inline Index grid{1};
inline uint64_t seed = 1;  // for the order of threads

#if defined(CUDA_ON_CPU_THREADS)

inline thread_local Thread current;

inline void wait(Barrier& barrier, int) { pthread_barrier_wait(&barrier.waiting); }
inline void may_yield() {}

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  constexpr unsigned kAtOnce = 8;  // blocks
  grid = Index{blocks};
  for (unsigned first = 0; first < blocks; first += kAtOnce) {
    std::vector<std::unique_ptr<Block>> running;
    std::vector<std::thread> workers;
    for (unsigned b = first; b < std::min(blocks, first + kAtOnce); ++b) {
      running.push_back(std::make_unique<Block>(b, threads));
    }
    for (const auto& block : running) {
      for (unsigned i = 0; i < threads; ++i) {
        workers.emplace_back([&kernel, i, block = block.get()] {
          current = Thread{block, Index{i}};
          kernel();
        });
      }
    }
    for (std::thread& worker : workers) worker.join();
  }
}

#else

inline Thread current;

#if defined(__SANITIZE_ADDRESS__)  // AddressSanitizer must be told of every change of stack
inline void leave_stack(void** saved, const void* bottom, size_t size) {
  __sanitizer_start_switch_fiber(saved, bottom, size);
}
inline void enter_stack(void* saved, const void** from, size_t* size) {
  __sanitizer_finish_switch_fiber(saved, from, size);
}
#else
inline void leave_stack(void**, const void*, size_t) {}
inline void enter_stack(void*, const void**, size_t*) {}
#endif

// The stack of one thread. Reused for all blocks, because a new one is slow to set up.
struct Fiber {
  static constexpr size_t kStack = 128 << 10;
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  bool started = false, done = true;
};

struct Scheduler {
  std::vector<Fiber> fibers;
  jmp_buf here;
  const void* stack = nullptr;
  size_t stack_size = 0;
  const std::function<void()>* kernel;
  std::mt19937_64 chance;
  bool progress;
};
inline Scheduler scheduler;

__attribute__((noinline)) inline void yield() {
  void* saved = nullptr;
  leave_stack(&saved, scheduler.stack, scheduler.stack_size);
  if (_setjmp(scheduler.fibers[current.index.x].here) == 0) _longjmp(scheduler.here, 1);
  enter_stack(saved, &scheduler.stack, &scheduler.stack_size);
}

// Runs a fiber until it yields.
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  void* saved = nullptr;
  leave_stack(&saved, fiber.stack.get(), Fiber::kStack);
  if (_setjmp(scheduler.here) == 0) {
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }
  enter_stack(saved, nullptr, nullptr);
}

inline void run_fiber() {
  enter_stack(nullptr, &scheduler.stack, &scheduler.stack_size);
  for (;;) {
    (*scheduler.kernel)();
    scheduler.fibers[current.index.x].done = true;
    scheduler.progress = true;
    ++current.block->exited;
    yield();
  }
}

inline void wait(Barrier& barrier, int line) {
  if (barrier.arrived > 0 && barrier.line != line) fail("threads wait at different barriers", line);
  barrier.line = line;
  scheduler.progress = true;
  const uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline void may_yield() {
  if (scheduler.chance() % 8 != 0) return;
  scheduler.progress = true;
  yield();
}

inline void run_block(Block& block) {
  std::vector<unsigned> order(block.threads);
  for (unsigned i = 0; i < block.threads; ++i) order[i] = i, scheduler.fibers[i].done = false;
  while (block.exited < block.threads) {
    scheduler.progress = false;
    std::shuffle(order.begin(), order.end(), scheduler.chance);
    for (const unsigned i : order) {
      if (scheduler.fibers[i].done) continue;
      current = Thread{&block, Index{i}};
      resume(scheduler.fibers[i]);
    }
    if (!scheduler.progress) fail("a barrier that not all of its threads reach", block.barrier.line);
  }
}

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  grid = Index{blocks};
  scheduler.kernel = &kernel;
  scheduler.chance.seed(seed);
  if (scheduler.fibers.empty()) {
    scheduler.fibers = std::vector<Fiber>(threads);
    for (Fiber& fiber : scheduler.fibers) {
      getcontext(&fiber.start);
      fiber.start.uc_stack.ss_sp = fiber.stack.get();
      fiber.start.uc_stack.ss_size = Fiber::kStack;
      fiber.start.uc_link = nullptr;
      makecontext(&fiber.start, run_fiber, 0);
    }
  }
  if (scheduler.fibers.size() != threads) fail("every launch must have as many threads to a block", __LINE__);
  for (unsigned b = 0; b < blocks; ++b) {
    Block block(b, threads);
    run_block(block);
  }
}

#endif

// The shared array that is declared at a line, the same for all threads of a block. It has a block of memory of its
// own, so that AddressSanitizer sees accesses beyond it.
template <class A>
A& shared_memory(const char* file, int line) {
#if defined(CUDA_ON_CPU_THREADS)
  const std::lock_guard<std::mutex> lock(current.block->mutex);
#endif
  auto& memory = current.block->shared[{file, line}];
  if (memory == nullptr) {
    constexpr size_t kWords = (sizeof(A) + 7) / 8;
    memory.reset(new uint64_t[kWords]);
    memset(memory.get(), 0xFF, kWords * 8);
  }
  return *reinterpret_cast<A*>(memory.get());
}

// Publishes the value of each lane of a warp and returns choose(values, lane). All lanes must take part.
template <class T, class F>
T exchange(unsigned members, T value, int line, const F& choose) {
  if (members != 0xFFFFFFFFu) fail("warp operations must be of whole warps", line);
  Warp& warp = current.block->warps[current.index.x / kWarp];
  const unsigned lane = current.index.x % kWarp;
  uint64_t* values = warp.values[current.block->exchanges[current.index.x]++ % 2];
  memcpy(&values[lane], &value, sizeof(value));
  wait(warp.barrier, line);
  return choose(values, lane);
}

template <class T>
T from_lane(const uint64_t* values, unsigned lane) {
  T value;
  memcpy(&value, &values[lane], sizeof(value));
  return value;
}

template <class T, class F>
T update(T* address, const F& f) {
  may_yield();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(address, &old, f(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

template <class T>
T shuffle_up(unsigned members, T value, unsigned distance, int line) {
  return exchange(members, value, line, [=](const uint64_t* values, unsigned lane) {
    return from_lane<T>(values, lane >= distance ? lane - distance : lane);
  });
}

template <class T>
T shuffle_xor(unsigned members, T value, unsigned distance, int line) {
  return exchange(members, value, line,
                  [=](const uint64_t* values, unsigned lane) { return from_lane<T>(values, lane ^ distance); });
}

inline unsigned reduce_add(unsigned members, unsigned value, int line) {
  return exchange(members, value, line, [](const uint64_t* values, unsigned) {
    unsigned sum = 0;
    for (unsigned lane = 0; lane < kWarp; ++lane) sum += from_lane<unsigned>(values, lane);
    return sum;
  });
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current.index)
#define blockIdx (cuda_on_cpu::current.block->index)
#define gridDim (cuda_on_cpu::grid)
#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::current.block->barrier, __LINE__)
#define __shfl_up_sync(members, value, distance) cuda_on_cpu::shuffle_up(members, value, distance, __LINE__)
#define __shfl_xor_sync(members, value, distance) cuda_on_cpu::shuffle_xor(members, value, distance, __LINE__)
#define __reduce_add_sync(members, value) cuda_on_cpu::reduce_add(members, value, __LINE__)

inline unsigned atomicAdd(unsigned* address, unsigned value) {
  return cuda_on_cpu::update(address, [=](unsigned old) { return old + value; });
}
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return cuda_on_cpu::update(address, [=](unsigned long long old) { return old + value; });
}
inline unsigned long long atomicMin(unsigned long long* address, unsigned long long value) {
  return cuda_on_cpu::update(address, [=](unsigned long long old) { return old < value ? old : value; });
}
