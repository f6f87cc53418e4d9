// A stand-in for libcuda: every call that Triton makes succeeds at once, and launches are counted.
//
// It says that it is one device of compute capability 9.0. Nothing is loaded, allocated or run.

typedef int Result;  // CUresult; 0: success
typedef unsigned long long Word;

Word launches = 0;

static void* const kContext = (void*)0x10;
static void* const kModule = (void*)0x20;
static void* const kFunction = (void*)0x30;

enum Attribute {  // of CUdevice_attribute
  kSharedMemoryOfBlock = 8,
  kWarpSize = 10,
  kRegistersOfBlock = 12,
  kMultiprocessors = 16,
  kMajor = 75,
  kMinor = 76,
  kSharedMemoryOfBlockOptIn = 97,
};

Result cuInit(unsigned flags) { return 0; }

Result cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}

Result cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}

Result cuDeviceGet(int* device, int ordinal) {
  *device = 0;
  return 0;
}

Result cuDeviceGetAttribute(int* value, int attribute, int device) {
  switch (attribute) {
    case kSharedMemoryOfBlock:
    case kSharedMemoryOfBlockOptIn: *value = 232448; break;
    case kWarpSize: *value = 32; break;
    case kRegistersOfBlock: *value = 65536; break;
    case kMultiprocessors: *value = 132; break;
    case kMajor: *value = 9; break;
    case kMinor: *value = 0; break;
    default: *value = 1024;
  }
  return 0;
}

Result cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = kContext;
  return 0;
}

Result cuCtxGetCurrent(void** context) {
  *context = kContext;
  return 0;
}

Result cuCtxSetCurrent(void* context) { return 0; }

Result cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}

Result cuCtxGetLimit(Word* value, int limit) {
  *value = 0;
  return 0;
}

Result cuCtxSetLimit(int limit, Word value) { return 0; }

Result cuModuleLoadData(void** module, const void* image) {
  *module = kModule;
  return 0;
}

Result cuModuleUnload(void* module) { return 0; }

Result cuModuleGetFunction(void** function, void* module, const char* name) {
  *function = kFunction;
  return 0;
}

Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  *value = attribute == 0 ? 1024 : 0;  // 0: threads of a block at most; others: memory
  return 0;
}

Result cuFuncSetAttribute(void* function, int attribute, int value) { return 0; }

Result cuFuncSetCacheConfig(void* function, int config) { return 0; }

Result cuGetErrorString(int error, const char** text) {
  *text = "an error of the stand-in";
  return 0;
}

Result cuLaunchKernelEx(const void* config, void* function, void** parameters, void** extra) {
  ++launches;
  return 0;
}

Result cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                      unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                      void** extra) {
  ++launches;
  return 0;
}

Result cuPointerGetAttribute(void* data, int attribute, Word pointer) {
  *(Word*)data = pointer;  // the address on the device is the one given
  return 0;
}

Result cuOccupancyMaxActiveClusters(int* clusters, void* function, const void* config) {
  *clusters = 1;
  return 0;
}

Result cuStreamGetId(void* stream, Word* id) {
  *id = 1;
  return 0;
}

Result cuTensorMapEncodeTiled(void) { return 0; }

Result cuTensorMapEncodeIm2col(void) { return 0; }
