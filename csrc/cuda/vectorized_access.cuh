// Reads and writes of global memory in accesses of 16 bytes, the widest that a thread has.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda/launch.cuh"

namespace feather::cuda {

constexpr int kAccess = 16;  // bytes of an access

// N elements that are read and written together; their size must be a multiple of 16 bytes.
template <class W, int N>
struct Pack {
  W values[N];
};

// These are in assembly because the compiler may split an assignment into narrower accesses. The addresses must be
// multiples of 16.
__device__ __forceinline__ uint4 load_16_bytes(const uint4* from) {
#if defined(FEATHER_CUDA_ON_CPU)
  return *from;
#else
  uint4 words;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(from));
  return words;
#endif
}

__device__ __forceinline__ void store_16_bytes(uint4* to, const uint4& words) {
#if defined(FEATHER_CUDA_ON_CPU)
  *to = words;
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
#endif
}

// The N elements at an address that is a multiple of 16.
template <int N, class W>
__device__ __forceinline__ Pack<W, N> load_pack(const W* from) {
  static_assert(sizeof(Pack<W, N>) % kAccess == 0, "a pack is filled by whole accesses");
  uint4 words[sizeof(Pack<W, N>) / kAccess];
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(words) / kAccess); ++i) {
    words[i] = load_16_bytes(reinterpret_cast<const uint4*>(from) + i);
  }
  Pack<W, N> pack;
  memcpy(&pack, words, sizeof(pack));
  return pack;
}

// Writes N elements to an address that is a multiple of 16.
template <int N, class W>
__device__ __forceinline__ void store_pack(W* to, const Pack<W, N>& pack) {
  uint4 words[sizeof(Pack<W, N>) / kAccess];
  memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(words) / kAccess); ++i) {
    store_16_bytes(reinterpret_cast<uint4*>(to) + i, words[i]);
  }
}

}  // namespace feather::cuda
