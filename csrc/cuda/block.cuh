// Sums and minima over the threads of a warp and of a block. Every thread of it must take part.
#pragma once

#include "cuda/device.cuh"

namespace feather::cuda {

constexpr int kWarps = kThreads / 32;  // of a block

__device__ __forceinline__ bool is_first_of_warp() { return threadIdx.x % 32 == 0; }

__device__ __forceinline__ void add_to(int64_t* counter, int64_t count) {  // atomically; integers in any order
  atomicAdd(reinterpret_cast<unsigned long long*>(counter), static_cast<unsigned long long>(count));
}

// Adds the counts of a warp's threads to a counter in global memory.
__device__ __forceinline__ void add_warp(int64_t* counter, unsigned count) {
  const unsigned sum = __reduce_add_sync(kWholeWarp, count);
  if (sum > 0 && is_first_of_warp()) add_to(counter, sum);
}

template <class K>
__device__ __forceinline__ K warp_minimum(K key) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const K other = __shfl_xor_sync(kWholeWarp, key, distance);
    key = other < key ? other : key;
  }
  return key;
}

struct Sums {
  int64_t before;  // of the threads before this one
  int64_t total;
};

// Barriers before and behind: shared memory that was written is seen, and warp_sums (kWarps) can be used again.
__device__ __forceinline__ Sums block_sums(int64_t value, int64_t* warp_sums) {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t through = value;
#pragma unroll
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    const int64_t other = __shfl_up_sync(kWholeWarp, through, distance);
    if (lane >= distance) through += other;
  }
  if (lane == 31) warp_sums[warp] = through;
  __syncthreads();
  Sums sums{through - value, 0};
  for (unsigned i = 0; i < kWarps; ++i) {
    if (i < warp) sums.before += warp_sums[i];
    sums.total += warp_sums[i];
  }
  __syncthreads();
  return sums;
}

}  // namespace feather::cuda
