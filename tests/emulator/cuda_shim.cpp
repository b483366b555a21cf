// The launches of csrc/cuda/launch.h for ctypes: an exception becomes 1 and its message. Not here:
// the structures' texts (tests/host_cluster.py, cuda_library.py), whose sizes are compared there.
#include <cstdio>
#include <exception>

#include "../../csrc/cuda/launch.h"
#include "../../csrc/cuda/row_group.h"

using namespace pyoffline;

namespace {

constexpr size_t kMessageBytes = 512;

template <class Call>
int caught(char* message, const Call& call) {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, kMessageBytes, "%s", error.what());
    return 1;
  }
}

}  // namespace

extern "C" {

int shim_row_pass(const RowArgs* args, const gpu::CudaLaunch* to, char* message) {
  return caught(message, [&] { gpu::cuda_row_pass(*args, *to); });
}

int shim_scale(void* grad, int type, int64_t size, const float* upstream, const gpu::CudaLaunch* to,
               char* message) {
  return caught(message, [&] {
    gpu::cuda_scale_by_upstream(grad, static_cast<DType>(type), size, upstream, *to);
  });
}

int shim_why_not(int device, char* message) {
  return caught(message, [&] {
    std::snprintf(message, kMessageBytes, "%s", gpu::cuda_why_not(device).c_str());
  });
}

// out: bytes of RowArgs, RowTask, CudaLaunch
void shim_sizes(int64_t* out) {
  out[0] = sizeof(RowArgs);
  out[1] = sizeof(gpu::RowTask);
  out[2] = sizeof(gpu::CudaLaunch);
}
}
