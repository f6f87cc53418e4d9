// What the kernels need of CUDA, and how all of them are launched and read memory.
//
// With FEATHER_CUDA_ON_CPU the same sources are C++ for a CPU: csrc/tests/cuda/cuda_on_cpu.h stands in for CUDA.
#pragma once

#include <stdint.h>

#include <stdexcept>
#include <string>

#include "feather/math.h"

#if defined(FEATHER_CUDA_ON_CPU)
#include "tests/cuda/cuda_on_cpu.h"
#else
#define FEATHER_SHARED(type, name, size) __shared__ type name[size]
#endif

namespace feather::cuda {

#if !defined(FEATHER_CUDA_THREADS)
#define FEATHER_CUDA_THREADS 256  // tests that give every CUDA thread one of the system's use fewer
#endif
constexpr int kThreads = FEATHER_CUDA_THREADS;  // of every block
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kThreadsOnProcessor = 1024;  // all that it holds
#else
constexpr int kThreadsOnProcessor = 1536;  // at least: no kernel may take more than 40 registers
#endif
constexpr int kBlocksOnProcessor = kThreadsOnProcessor / kThreads;
constexpr int kAccess = 16;  // bytes of the widest access to memory
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

// N elements that are read and written in accesses of 16 bytes; they must fill these.
template <class W, int N>
struct Pack {
  W values[N];
};

// Assignments may be compiled to narrower accesses.
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

template <int N, class W>
__device__ __forceinline__ void store_pack(W* to, const Pack<W, N>& pack) {
  uint4 words[sizeof(Pack<W, N>) / kAccess];
  memcpy(words, &pack, sizeof(pack));
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(words) / kAccess); ++i) {
    store_16_bytes(reinterpret_cast<uint4*>(to) + i, words[i]);
  }
}

// Launches on `stream` and reports what went wrong under the op's name; empty grids are the caller's to avoid.
template <class... Parameters, class... Arguments>
void launch(const char* op, int64_t blocks, void* stream, void (*kernel)(Parameters...), Arguments... arguments) {
#if defined(FEATHER_CUDA_ON_CPU)
  cuda_on_cpu::launch(static_cast<unsigned>(blocks), kThreads, [=] { kernel(arguments...); });
  static_cast<void>(op), static_cast<void>(stream);
#else
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(op) + ": CUDA error " + cudaGetErrorName(error) + ": " +
                             cudaGetErrorString(error));
  }
#endif
}

}  // namespace feather::cuda
