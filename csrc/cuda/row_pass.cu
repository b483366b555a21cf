// The CUDA row pass: one kernel for each pair of dtypes, and its launch.
//
// Kernels run row_algorithm.h, one cluster (one block below compute capability 9.0) a row. A launch
// sets the device, asks the driver for nothing that waits, and may be captured in a CUDA graph. No
// CUDA call is made before the first use. Not here: argument checks (bind_cuda.cpp), what is
// computed (row_algorithm.h).
#include <cuda_runtime.h>

#include <mutex>
#include <stdexcept>
#include <vector>

#include "cuda_call.h"
#include "cuda_group.h"
#include "launch.h"
#include "row_algorithm.h"
#include "row_plan.h"

namespace pyoffline {
namespace gpu {

namespace {

template <class T, class Out>
__global__ void __launch_bounds__(1024, 1)
    row_kernel(const __grid_constant__ RowTask task, int64_t first_row) {
  extern __shared__ __align__(16) char memory[];
  CudaGroup group(memory);
  const int n = group.blocks(), log2_n = (n >> 1) - (n >> 3);  // 1, 2, 4 or 8
  const int64_t row = first_row + (blockIdx.x >> log2_n);
  RowAlgorithm<T, Out, CudaGroup>(group, task, row).run();
}

using Kernel = void (*)(RowTask, int64_t);

struct KernelRow {
  DType in, out;
  Kernel kernel;
};

const KernelRow kKernels[] = {
    {DType::f32, DType::f32, row_kernel<float, float>},
    {DType::bf16, DType::bf16, row_kernel<bf16, bf16>},
    {DType::f16, DType::f16, row_kernel<f16, f16>},
    {DType::f32, DType::bf16, row_kernel<float, bf16>},
    {DType::f32, DType::f16, row_kernel<float, f16>},
};

const KernelRow* find_kernel(DType in, DType out) {
  for (const KernelRow& each : kKernels)
    if (each.in == in && each.out == out) return &each;
  return nullptr;
}

// What is asked of a device once: its limits, and that every kernel may use all of its memory.
struct DeviceState {
  bool is_ready = false;
  DeviceLimits limits{};
};

DeviceState& device_state(int device) {
  static std::mutex mutex;
  static std::vector<DeviceState>* states = new std::vector<DeviceState>(64);
  std::lock_guard<std::mutex> lock(mutex);
  if (device < 0 || device >= static_cast<int>(states->size()))
    throw std::runtime_error("cuda row_pass: device index " + std::to_string(device));
  DeviceState& state = (*states)[device];
  if (state.is_ready) return state;
  const DeviceGuard guard(device);
  auto attribute = [device](cudaDeviceAttr which) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device), "reading the device's limits");
    return value;
  };
  state.limits.capability = 10 * attribute(cudaDevAttrComputeCapabilityMajor) +
                            attribute(cudaDevAttrComputeCapabilityMinor);
  state.limits.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  for (const KernelRow& each : kKernels)
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(each.kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(state.limits.shared_bytes)),
          "raising the shared memory limit (is there code for this device?)");
  state.is_ready = true;
  return state;
}

bool reads_gap(const RowArgs& args) {
  if (args.gap) return true;
  for (int32_t k = 0; k < args.n_terms; ++k)
    if (args.terms[k].code == smoothing_code && args.terms[k].scale != 0.0f) return true;
  return false;
}

RowTask make_task(const RowArgs& args, const CudaLaunch& launch, const RowPlan& plan) {
  RowTask task{};
  task.args = args;
  task.args.terms = nullptr;
  task.args.extras = nullptr;
  for (int32_t k = 0; k < args.n_terms; ++k) task.terms[k] = args.terms[k];
  for (int32_t k = 0; k < args.n_extras; ++k) task.extras[k] = args.extras[k];
  task.scale = launch.scale;
  task.bad_label = launch.bad_label;
  task.capacity = static_cast<int32_t>(plan.capacity);
  task.wants_gap = reads_gap(args);
  task.writes_stats = !args.coefs || args.loss || args.logps || args.entropy || args.lse ||
                      args.gap || args.log_sum_p2 || args.is_top1;
  task.is_narrowing = args.dlogits == args.logits && args.dlogits_type != args.logits_type;
  return task;
}

void launch_rows(const KernelRow& row, const RowTask& task, const RowPlan& plan, int64_t first_row,
                 int64_t rows, cudaStream_t stream) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * plan.blocks));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = static_cast<size_t>(plan.shared_bytes);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = plan.blocks > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, row.kernel, task, first_row),
        "launching row_pass of " + std::to_string(rows) + " rows of " +
            std::to_string(task.args.vocab) + " logits as " + std::to_string(plan.blocks) +
            " blocks of " + std::to_string(plan.threads) + " threads with " +
            std::to_string(plan.shared_bytes) + " bytes of shared memory");
}

}  // namespace

bool has_row_kernel(DType logits, DType dlogits) { return find_kernel(logits, dlogits) != nullptr; }

DeviceLimits device_limits(int device) { return device_state(device).limits; }

void cuda_row_pass(const RowArgs& args, const CudaLaunch& launch) {
  const KernelRow* row =
      find_kernel(args.logits_type, args.dlogits ? args.dlogits_type : args.logits_type);
  if (!row) throw std::runtime_error("cuda row_pass: no kernel for this pair of dtypes");
  const DeviceGuard guard(launch.device);
  const int64_t item = args.logits_type == DType::f32 ? 4 : 2;
  const RowPlan plan = plan_row(args.vocab, item, device_limits(launch.device));
  const RowTask task = make_task(args, launch, plan);
  constexpr int64_t kMostRows = int64_t{1} << 27;  // times 8 blocks: a grid of less than 2^31
  for (int64_t first = 0; first < args.rows; first += kMostRows) {
    const int64_t rows = args.rows - first < kMostRows ? args.rows - first : kMostRows;
    launch_rows(*row, task, plan, first, rows, reinterpret_cast<cudaStream_t>(launch.stream));
  }
}

std::string cuda_why_not(int device) {
  int count = 0, runtime = 0, driver = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  auto version = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  if (driver == 0) return "there is no NVIDIA driver";
  if (error == cudaErrorInsufficientDriver || driver / 1000 < runtime / 1000)
    return "the driver serves CUDA " + version(driver) + ", pyoffline._C was built with " +
           version(runtime) + ": update the driver or build with an older toolkit";
  if (error != cudaSuccess) {
    cudaGetLastError();
    return std::string("the driver answers ") + cudaGetErrorString(error);
  }
  if (device < 0 || device >= count)
    return "there is no device cuda:" + std::to_string(device) + " (" + std::to_string(count) +
           " in all)";
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (major < 8) return "it needs compute capability 8.0, this device has " + std::to_string(major);
  cudaFuncAttributes attributes{};
  const DeviceGuard guard(device);
  if (cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernels[0].kernel)) !=
      cudaSuccess) {
    cudaGetLastError();
    return "pyoffline._C holds no code for this device's compute capability " +
           std::to_string(major) + ".x: rebuild with a newer toolkit";
  }
  return "";
}

}  // namespace gpu
}  // namespace pyoffline
