// CUDA calls of a launch: errors become exceptions that name what was done, and a device is current
// for a block. Needs CUDA headers; not here: kernels.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pyoffline {
namespace gpu {

inline void check(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here is not reported again by the next caller
  throw std::runtime_error("pyoffline cuda: " + what + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

// Makes a device current for a block.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "asking for the current device");
    if (device != before_) check(cudaSetDevice(device), "choosing cuda:" + std::to_string(device));
    changed_ = device != before_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace gpu
}  // namespace pyoffline
