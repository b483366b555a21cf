// A stand-in for libcuda.so.1 without a GPU: what Triton's launcher calls, on a device that has the
// limits of an H100 and runs nothing. `stub_launches` counts launches and keeps the last one's
// shape; `stub_on_launch` names a function that gets every launch (the emulator's). A tensor map is
// refused where cuTensorMapEncodeTiled's own rules refuse it: 16-byte alignment of base and
// strides, boxes of at most 256; it holds what it was made of (struct Map). Not here: any memory or
// kernel (test_triton_launch.py, emulator/triton_driver.py).
#include <string.h>

#include "cuda.h"

typedef int (*OnLaunch)(long function, const unsigned* grid_block, unsigned shared_bytes,
                        void** params);

// What emulator/matrix.py reads of a tensor map, in its 128 bytes.
struct Map {
  cuuint64_t base, dims[2], stride;
  cuuint32_t box[2], type, swizzle;
};

static int launches, shape[3];
static long functions;
static OnLaunch on_launch;

void stub_on_launch(OnLaunch f) { on_launch = f; }

int stub_launches(int* grid_block_shared) {
  memcpy(grid_block_shared, shape, sizeof(shape));
  return launches;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** params, void** extra) {
  (void)extra;
  launches += 1;
  shape[0] = (int)c->gridDimX, shape[1] = (int)c->blockDimX, shape[2] = (int)c->sharedMemBytes;
  if (c->sharedMemBytes > 232448 || c->blockDimX > 1024 || !params[0])
    return CUDA_ERROR_INVALID_VALUE;
  const unsigned sizes[6] = {c->gridDimX,  c->gridDimY,  c->gridDimZ,
                             c->blockDimX, c->blockDimY, c->blockDimZ};
  if (on_launch && on_launch((long)f, sizes, c->sharedMemBytes, params)) return CUDA_ERROR_UNKNOWN;
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                void* base, const cuuint64_t* dims, const cuuint64_t* strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)steps, (void)interleave, (void)promotion, (void)fill;
  if ((size_t)base % 16) return CUDA_ERROR_INVALID_VALUE;
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (!dims[i] || dims[i] > 1ull << 32 || !box[i] || box[i] > 256)
      return CUDA_ERROR_INVALID_VALUE;
    if (i + 1 < rank && (strides[i] % 16 || strides[i] >= 1ull << 40))
      return CUDA_ERROR_INVALID_VALUE;
  }
  const struct Map made = {(cuuint64_t)base,
                           {dims[0], rank > 1 ? dims[1] : 1},
                           rank > 1 ? strides[0] : 0,
                           {box[0], rank > 1 ? box[1] : 1},
                           type,
                           swizzle};
  memcpy(map, &made, sizeof(made));
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void* out, CUpointer_attribute which, CUdeviceptr pointer) {
  (void)which;
  memcpy(out, &pointer, sizeof(pointer));
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* out, CUdevice_attribute which, CUdevice device) {
  (void)device;
  *out = which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT                ? 132
         : which == CU_DEVICE_ATTRIBUTE_WARP_SIZE                         ? 32
         : which == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN ? 232448
                                                                          : 65536;
  return CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int* out, CUfunction_attribute which, CUfunction f) {
  (void)f;
  *out = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) {
  *module = (CUmodule)image;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction* f, CUmodule module, const char* name) {
  (void)module, (void)name;
  *f = (CUfunction)++functions;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
  *context = (CUcontext)1;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult error, const char** text) {
  (void)error;
  *text = "refused by the stand-in for the driver";
  return CUDA_SUCCESS;
}

// Linked against, not reached by a launch that has a context.
CUresult cuCtxSetCurrent(CUcontext c) { return c ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; }
CUresult cuDeviceGet(CUdevice* d, int i) {
  return (*d = i) ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { return (void)d, cuCtxGetCurrent(c); }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) {
  return (void)f, (void)a, v >= 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) {
  return (void)f, (void)c, CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t* n, CUlimit l) { return (void)l, *n = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit l, size_t n) { return (void)l, (void)n, CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int* n, CUfunction f, const CUlaunchConfig* c) {
  return (void)f, (void)c, *n = 1, CUDA_SUCCESS;
}
