// Reductions and prefix sums over the threads of a warp or a block, and sums into counters in global memory. Every
// thread of the warp or block must call them.
#pragma once

#include <stdint.h>

#include "cuda/launch.cuh"

namespace feather::cuda {

constexpr int kWarps = kThreads / 32;  // of a block
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

__device__ __forceinline__ bool is_first_of_warp() { return threadIdx.x % 32 == 0; }

// Adds to a counter atomically. Counts are integers, so the order does not matter. One thread suffices.
__device__ __forceinline__ void add_to(int64_t* counter, int64_t count) {
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(count));
}

// The values of a warp's threads combined by f, on each thread; f must be associative and commutative.
template <class T, class F>
__device__ __forceinline__ T reduce_warp(T value, const F& f) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    value = f(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}

// The sum over a warp's threads, on each thread.
__device__ __forceinline__ unsigned sum_of_warp(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return reduce_warp(value, [](unsigned a, unsigned b) { return a + b; });
#else
  return __reduce_add_sync(kWholeWarp, value);
#endif
}

// Adds the counts of a warp's threads to a counter in global memory, in at most one atomic operation.
__device__ __forceinline__ void add_warp(int64_t* counter, unsigned count) {
  const unsigned sum = sum_of_warp(count);
  if (sum > 0 && is_first_of_warp()) add_to(counter, sum);
}

// The sum over a block, on each thread. warp_sums is shared memory for kWarps numbers. Barriers inside make earlier
// writes to shared memory visible, and let warp_sums be used again right after.
__device__ __forceinline__ int64_t block_total(int64_t value, int64_t* warp_sums) {
  const int64_t sum = reduce_warp(value, [](int64_t a, int64_t b) { return a + b; });
  if (is_first_of_warp()) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  int64_t total = 0;
  for (unsigned i = 0; i < kWarps; ++i) total += warp_sums[i];
  __syncthreads();
  return total;
}

// The sum over the threads of a block before this one; warp_sums and barriers as for block_total.
__device__ __forceinline__ int64_t block_sum_before(int64_t value, int64_t* warp_sums) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t through = value;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(kWholeWarp, through, distance);
    if (lane >= distance) through += other;
  }
  if (lane == 31) warp_sums[warp] = through;
  __syncthreads();
  int64_t before = through - value;
  for (unsigned i = 0; i + 1 < kWarps; ++i) before += i < warp ? warp_sums[i] : 0;
  __syncthreads();
  return before;
}

}  // namespace feather::cuda
