// A stand-in for the CUDA runtime (cudart), to be linked with the shipped objects of csrc/cuda on a machine without a
// GPU. Each launch goes, with its stream and the addresses of its arguments, to a function that executes the kernel's
// PTX: see tests/simulated_gpu/executed_cuda.py.
//
// It defines exactly the symbols that the objects use, with the types of the runtime's ABI; any other fails to link.
#include <stddef.h>
#include <stdint.h>

#include <map>
#include <string>

namespace {

struct Dim3 {
  unsigned x, y, z;
};

struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

enum Error { kSuccess = 0, kInvalidConfiguration = 9, kInvalidDeviceFunction = 98 };

using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, size_t shared, void* stream,
                         void** arguments);

Launcher launcher = nullptr;
int last_error = kSuccess;
thread_local Configuration pushed;

// The names of kernels by the addresses of their host functions. The constructors of the kernels' objects register
// them.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> all;
  return all;
}

bool is_valid(const Dim3& grid, const Dim3& block) {
  constexpr unsigned kMostThreads = 1024, kMostBlocks = 0x7FFFFFFFu, kMostRows = 0xFFFFu;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  return grid.x > 0 && grid.x <= kMostBlocks && grid.y > 0 && grid.y <= kMostRows && grid.z > 0 &&
         grid.z <= kMostRows && threads > 0 && threads <= kMostThreads;
}

int launch(const void* function, const Dim3& grid, const Dim3& block, void** arguments, size_t shared, void* stream) {
  const auto found = kernels().find(function);
  if (found == kernels().end() || launcher == nullptr) return kInvalidDeviceFunction;
  if (!is_valid(grid, block)) return kInvalidConfiguration;
  return launcher(found->second.c_str(), &grid.x, &block.x, shared, stream, arguments);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void feather_set_launcher(Launcher function) { launcher = function; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void**) {}

void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, void*, void*, void*, void*,
                            int*) {
  kernels()[function] = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}

int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid;
  *block = pushed.block;
  *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return kSuccess;
}

int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return kSuccess;
}

int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void* stream) {
  return last_error = launch(kernel, grid, block, arguments, shared, stream);
}

int cudaGetLastError() {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}

const char* cudaGetErrorName(int error) {
  switch (error) {
    case kInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case kInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    default:
      return "cudaErrorLaunchFailure";
  }
}

const char* cudaGetErrorString(int) { return "reported by the stand-in for the CUDA runtime"; }
}
