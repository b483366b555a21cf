// The CUDA row pass as the bindings call it. No CUDA headers, so that any C++ file may include it.
#pragma once

#include <cstdint>
#include <string>

#include "../row_args.h"
#include "limits.h"

namespace pyoffline {
namespace gpu {

struct CudaLaunch {
  int device;
  uintptr_t stream;    // cudaStream_t of that device
  const float* scale;  // [1] on the device, or null
  int64_t* bad_label;  // pinned host memory, or null
};

// Whether there is a kernel from logits of one dtype to dlogits of the other: the same, or fp32 to
// bf16 or fp16.
bool has_row_kernel(DType logits, DType dlogits);

// Puts the row pass of args.rows rows on the stream and returns; nothing waits for the device. args
// holds device pointers but for terms and extras (host arrays of at most kMaxTerms and kMaxExtras).
// Throws std::runtime_error when the launch fails.
void cuda_row_pass(const RowArgs& args, const CudaLaunch& launch);

// grad *= *upstream in place for `size` elements in a row; to.device and to.stream alone are read.
void cuda_scale_by_upstream(void* grad, DType type, int64_t size, const float* upstream,
                            const CudaLaunch& to);

// Limits of a device; throws std::runtime_error without a driver or device.
DeviceLimits device_limits(int device);

// "" or why no kernel can run on this device ("no driver", a compute capability without code).
std::string cuda_why_not(int device);

}  // namespace gpu
}  // namespace pyoffline
