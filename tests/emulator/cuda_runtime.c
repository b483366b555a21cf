// A stand-in for the CUDA runtime without a GPU: what objects that nvcc makes of csrc/cuda call.
//
// Kernels are known by their registration, devices by stand_in_device. A launch is refused where a
// device refuses it (shape, shared memory beyond what was opted in, clusters); else the callback
// runs it before the launch returns. Device pointers are the CPU's. Not here: streams (any handle
// is taken), graphs, machine code (registered and never read), what a kernel does (machine.py).
#include <cuda_runtime_api.h>
#include <string.h>

enum { kDevices = 64, kFunctions = 64, kPlainShared = 48 << 10, kMostCluster = 8 };

// What the callback is given; cuda_library.py holds the same fields.
struct Launch {
  const char* name;  // mangled, as in the PTX
  int device;
  unsigned grid[3], block[3], cluster;
  size_t shared_bytes;
  void** args;
};

typedef int (*OnLaunch)(const struct Launch*);  // a cudaError_t

struct Function {
  const void* host;
  const char* name;
  int most_threads;            // of __launch_bounds__
  int shared_bytes[kDevices];  // opted in; 0: nothing was
};

static struct Device {
  int capability, shared_bytes;  // 10 * major + minor; of one block, opted in; 0: no device
} devices[kDevices];
static struct Function functions[kFunctions];
static int function_count, device_count, current;
static cudaError_t last;
static OnLaunch on_launch;
static struct {
  dim3 grid, block;
  size_t shared_bytes;
  struct CUstream_st* stream;
} pushed;

static cudaError_t fail(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

static int is_device(int i) { return i >= 0 && i < device_count && devices[i].capability; }

static struct Function* find(const void* host) {
  for (int i = 0; i < function_count; ++i)
    if (functions[i].host == host || (const void*)&functions[i] == host) return &functions[i];
  return NULL;
}

// ---- for the test ---------------------------------------------------------------------------
int stand_in_device(int device, int capability, int shared_bytes) {
  if (device < 0 || device >= kDevices) return cudaErrorInvalidDevice;
  devices[device] = (struct Device){capability, shared_bytes};
  if (device_count <= device) device_count = device + 1;
  return cudaSuccess;
}

void stand_in_on_launch(OnLaunch callback) { on_launch = callback; }

// ---- registration ---------------------------------------------------------------------------
void** __cudaRegisterFatBinary(void* binary) { return (void**)binary; }
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
char __cudaInitModule(void** handle) { return (void)handle, 1; }

void __cudaRegisterFunction(void** handle, const char* host, char* stub, const char* name,
                            int most_threads, uint3* tid, uint3* bid, dim3* block, dim3* grid,
                            int* warp) {
  (void)handle, (void)stub, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
  if (function_count == kFunctions) return;  // a launch of it finds no function
  struct Function each = {.host = host, .name = name, .most_threads = most_threads};
  functions[function_count++] = each;
}

// ---- launches -------------------------------------------------------------------------------
static int in_range(dim3 d, unsigned x, unsigned y, unsigned z) {
  return d.x && d.y && d.z && d.x <= x && d.y <= y && d.z <= z;
}

static cudaError_t refusal(const struct Function* f, dim3 grid, dim3 block, size_t shared_bytes) {
  if (!is_device(current)) return cudaErrorNoDevice;
  if (!f) return cudaErrorInvalidDeviceFunction;
  if (!in_range(grid, 0x7fffffffu, 65535, 65535) || !in_range(block, 1024, 1024, 64))
    return cudaErrorInvalidConfiguration;
  const unsigned threads = block.x * block.y * block.z;
  if (threads > 1024) return cudaErrorInvalidConfiguration;
  if (f->most_threads > 0 && threads > (unsigned)f->most_threads)
    return cudaErrorLaunchOutOfResources;
  const int opted = f->shared_bytes[current], limit = devices[current].shared_bytes;
  const int plain = limit < kPlainShared ? limit : kPlainShared;
  if (shared_bytes > (size_t)(opted > plain ? opted : plain)) return cudaErrorInvalidValue;
  return on_launch ? cudaSuccess : cudaErrorNotSupported;
}

static cudaError_t cluster_refusal(dim3 grid, dim3 cluster) {
  const unsigned blocks = cluster.x * cluster.y * cluster.z;
  if (blocks == 1) return cudaSuccess;
  if (devices[current].capability < 90) return cudaErrorNotSupported;
  if (blocks == 0 || blocks > kMostCluster) return cudaErrorInvalidClusterSize;
  if (cluster.y != 1 || cluster.z != 1) return cudaErrorNotSupported;  // by the stand-in
  return grid.x % cluster.x ? cudaErrorInvalidClusterSize : cudaSuccess;
}

static cudaError_t start(const void* function, dim3 grid, dim3 block, dim3 cluster,
                         size_t shared_bytes, void** args) {
  const struct Function* f = find(function);
  cudaError_t error = refusal(f, grid, block, shared_bytes);
  if (error == cudaSuccess) error = cluster_refusal(grid, cluster);
  if (error != cudaSuccess) return fail(error);
  const struct Launch launch = {
      .name = f->name,
      .device = current,
      .grid = {grid.x, grid.y, grid.z},
      .block = {block.x, block.y, block.z},
      .cluster = cluster.x,
      .shared_bytes = shared_bytes,
      .args = args,
  };
  return fail((cudaError_t)on_launch(&launch));
}

static const dim3 kAlone = {1, 1, 1};

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes,
                                     struct CUstream_st* stream) {
  pushed.grid = grid, pushed.block = block;
  pushed.shared_bytes = shared_bytes, pushed.stream = stream;
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes,
                                       void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared_bytes = pushed.shared_bytes;
  *(struct CUstream_st**)stream = pushed.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = (cudaKernel_t)(void*)find(host);
  return *kernel ? cudaSuccess : fail(cudaErrorInvalidDeviceFunction);
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** args,
                             size_t shared_bytes, cudaStream_t stream) {
  (void)stream;
  return start(function, grid, block, kAlone, shared_bytes, args);
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** args,
                               size_t shared_bytes, cudaStream_t stream) {
  return cudaLaunchKernel((const void*)kernel, grid, block, args, shared_bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function,
                                void** args) {
  dim3 cluster = kAlone;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id != cudaLaunchAttributeClusterDimension)
      return fail(cudaErrorNotSupported);  // an attribute that the stand-in would not honour
    cluster.x = config->attrs[i].val.clusterDim.x;
    cluster.y = config->attrs[i].val.clusterDim.y;
    cluster.z = config->attrs[i].val.clusterDim.z;
  }
  return start(function, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes,
               args);
}

// What a launch of the kernel `name` without arguments answers, for launches that are refused.
int stand_in_launch(const char* name, const unsigned* grid, const unsigned* block,
                    const unsigned* cluster, size_t shared_bytes) {
  const void* host = NULL;
  for (int i = 0; i < function_count; ++i)
    if (!strcmp(functions[i].name, name)) host = functions[i].host;
  cudaLaunchAttribute attribute = {.id = cudaLaunchAttributeClusterDimension};
  attribute.val.clusterDim.x = cluster[0];
  attribute.val.clusterDim.y = cluster[1];
  attribute.val.clusterDim.z = cluster[2];
  const cudaLaunchConfig_t config = {
      .gridDim = {grid[0], grid[1], grid[2]},
      .blockDim = {block[0], block[1], block[2]},
      .dynamicSmemBytes = shared_bytes,
      .attrs = &attribute,
      .numAttrs = 1,
  };
  return cudaLaunchKernelExC(&config, host, NULL);
}

// ---- questions ------------------------------------------------------------------------------
cudaError_t cudaFuncSetAttribute(const void* function, enum cudaFuncAttribute which, int value) {
  struct Function* f = find(function);
  if (!f) return fail(cudaErrorInvalidDeviceFunction);
  if (!is_device(current)) return fail(cudaErrorNoDevice);
  if (which != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 ||
      value > devices[current].shared_bytes)
    return fail(cudaErrorInvalidValue);
  f->shared_bytes[current] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* out, const void* function) {
  const struct Function* f = find(function);
  if (!f) return fail(cudaErrorInvalidDeviceFunction);
  memset(out, 0, sizeof(*out));
  out->maxThreadsPerBlock = f->most_threads > 0 ? f->most_threads : 1024;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* out, enum cudaDeviceAttr which, int device) {
  if (!is_device(device)) return fail(cudaErrorInvalidDevice);
  const struct Device* d = &devices[device];
  if (which == cudaDevAttrComputeCapabilityMajor)
    *out = d->capability / 10;
  else if (which == cudaDevAttrComputeCapabilityMinor)
    *out = d->capability % 10;
  else if (which == cudaDevAttrMaxSharedMemoryPerBlockOptin)
    *out = d->shared_bytes;
  else
    return fail(cudaErrorInvalidValue);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }

cudaError_t cudaSetDevice(int device) {
  if (!is_device(device)) return fail(cudaErrorInvalidDevice);
  current = device;
  return cudaSuccess;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count;
  return device_count ? cudaSuccess : fail(cudaErrorNoDevice);
}

cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaGetLastError(void) {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoDevice:
      return "cudaErrorNoDevice";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
    case cudaErrorLaunchOutOfResources:
      return "cudaErrorLaunchOutOfResources";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    case cudaErrorNotSupported:
      return "cudaErrorNotSupported";
    default:
      return "cudaErrorUnknown";
  }
}

const char* cudaGetErrorString(cudaError_t error) { return (void)error, "from the stand-in"; }
