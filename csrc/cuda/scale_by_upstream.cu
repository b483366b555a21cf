// grad *= upstream in place, where upstream is one number on the device.
//
// Every thread reads the number and returns when it is 1 (a plain loss.backward()): then nothing
// but 4 bytes a block is moved. Otherwise one read and one write of the gradient. Not here: the
// share of a thread (scale_elements.h), argument checks (bind_cuda.cpp).
#include <cuda_runtime.h>

#include "cuda_call.h"
#include "launch.h"
#include "scale_elements.h"

namespace pyoffline {
namespace gpu {

namespace {

constexpr int kThreads = 256;
// 16 blocks for each of 132 multiprocessors: beyond that a thread takes several shares.
constexpr int64_t kMostBlocks = 2112;

template <class T>
__global__ void __launch_bounds__(kThreads)
    scale_kernel(T* grad, const float* upstream, int64_t size) {
  const float factor = *upstream;
  if (factor == 1.0f) return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  scale_elements(grad, size, factor, thread, static_cast<int64_t>(gridDim.x) * kThreads);
}

template <class T>
void launch(void* grad, const float* upstream, int64_t size, cudaStream_t stream) {
  const int64_t shares = (size + Elements<T>::kPer - 1) / Elements<T>::kPer;
  const int64_t wanted = (shares + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < kMostBlocks ? wanted : kMostBlocks);
  scale_kernel<T><<<blocks, kThreads, 0, stream>>>(static_cast<T*>(grad), upstream, size);
  check(cudaGetLastError(), "launching scale_by_upstream of " + std::to_string(size) +
                                " elements as " + std::to_string(blocks) + " blocks");
}

}  // namespace

void cuda_scale_by_upstream(void* grad, DType type, int64_t size, const float* upstream,
                            const CudaLaunch& to) {
  if (size == 0) return;
  const DeviceGuard guard(to.device);
  const auto stream = reinterpret_cast<cudaStream_t>(to.stream);
  switch (type) {
    case DType::f32:
      return launch<float>(grad, upstream, size, stream);
    case DType::bf16:
      return launch<bf16>(grad, upstream, size, stream);
    case DType::f16:
      return launch<f16>(grad, upstream, size, stream);
  }
}

}  // namespace gpu
}  // namespace pyoffline
