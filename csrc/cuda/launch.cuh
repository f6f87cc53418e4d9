// The block size of every kernel, and how kernels are launched.
//
// With FEATHER_CUDA_ON_CPU the same sources compile as C++ for a CPU: csrc/tests/cuda/cuda_on_cpu.h stands in for CUDA.
#pragma once

#include <stdint.h>

#include <stdexcept>
#include <string>

#if defined(FEATHER_CUDA_ON_CPU)
#include "tests/cuda/cuda_on_cpu.h"
#else
// Declares an array in shared memory.
#define FEATHER_SHARED(type, name, size) __shared__ type name[size]
#endif

namespace feather::cuda {

#if !defined(FEATHER_CUDA_THREADS)
#define FEATHER_CUDA_THREADS 256  // fewer in tests that run each CUDA thread as a thread of the system
#endif
constexpr int kThreads = FEATHER_CUDA_THREADS;  // of every block
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kThreadsOnProcessor = 1024;  // as many as sm_75 holds
#else
constexpr int kThreadsOnProcessor = 1536;  // or more: limits kernels that move data to 40 registers a thread
#endif
constexpr int kBlocksOnProcessor = kThreadsOnProcessor / kThreads;  // for __launch_bounds__

// Launches a kernel in blocks of kThreads on `stream`, a cudaStream_t of the current device, and does not wait for it.
// `blocks` must be positive. Throws std::runtime_error with the name of the op and CUDA's message if the launch fails.
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
