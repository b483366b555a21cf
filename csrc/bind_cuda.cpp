// The CUDA kernels as Python calls them: the checks of row_pass on tensors of one device, then a
// launch on the stream that is given.
//
// Labels are on the device and are checked there (row_algorithm.h): a bad one makes its row NaN and
// sets bad_label, which is pinned host memory. Without nvcc at build time the functions are there
// and say so.
#include "bindings.h"
#include "cuda/launch.h"
#include "row_call.h"

namespace pyoffline {

namespace {

#ifdef PYOFFLINE_WITH_CUDA
std::string why_not(int device) { return gpu::cuda_why_not(device); }
void launch(const RowArgs& args, const gpu::CudaLaunch& to) { gpu::cuda_row_pass(args, to); }
void launch_scale(void* grad, DType type, int64_t size, const float* upstream,
                  const gpu::CudaLaunch& to) {
  gpu::cuda_scale_by_upstream(grad, type, size, upstream, to);
}
bool has_kernel(DType in, DType out) { return gpu::has_row_kernel(in, out); }
#else
std::string why_not(int) { return "pyoffline._C was built without CUDA (no nvcc was found)"; }
void launch(const RowArgs&, const gpu::CudaLaunch&) {
  throw std::runtime_error("cuda_row_pass: " + why_not(0));
}
void launch_scale(void*, DType, int64_t, const float*, const gpu::CudaLaunch&) {
  throw std::runtime_error("cuda_scale_by_upstream: " + why_not(0));
}
bool has_kernel(DType, DType) { return true; }
#endif

// What the kernel's own sizes allow.
void check_limits(const RowCall& row) {
  const RowArgs& args = row.args;
  constexpr int64_t kMostVocab = INT32_MAX - (1 << 20);  // room for the padding of a thread's slots
  if (args.vocab > kMostVocab)
    row.call.fail("logits", "at most " + std::to_string(kMostVocab) + " columns",
                  std::to_string(args.vocab), "split the vocabulary");
  if (args.n_terms > gpu::kMaxTerms)
    row.call.fail("codes", "at most " + std::to_string(gpu::kMaxTerms) + " terms",
                  std::to_string(args.n_terms), "compose fewer objectives in one call");
  if (args.n_extras > gpu::kMaxExtras)
    row.call.fail("extras", "at most " + std::to_string(gpu::kMaxExtras) + " tensors",
                  std::to_string(args.n_extras), "gate fewer terms in one call");
  if (args.dlogits && !has_kernel(args.logits_type, args.dlogits_type))
    row.call.fail("dlogits", "the logits' dtype, or bfloat16 or float16 beside float32 logits",
                  "another dtype", "allocate dlogits in the logits' dtype");
}

void cuda_row_pass_py(py::object logits, py::object labels, py::kwargs kwargs) {
  RowCall row(CallArgs("cuda_row_pass", kFirstDevice));
  Keywords keywords(row.call, std::move(kwargs));
  gpu::CudaLaunch to{};
  to.stream = static_cast<uintptr_t>(keywords.integer("stream", 0, 0, INT64_MAX));
  read_row_call(row, logits, keywords);
  row.args.labels =
      static_cast<int64_t*>(row.call.input(labels, "labels", kI64, {row.args.rows}).data);
  to.scale = static_cast<float*>(
      row.call.maybe_input(keywords.get("device_scale"), "device_scale", kF32, {1}).data);
  to.device = row.call.device();
  {
    const CallArgs::HostScope on_the_host(row.call);
    to.bad_label = static_cast<int64_t*>(
        row.call.maybe_output(keywords.get("bad_label"), "bad_label", kI64, {2}).data);
  }
  keywords.check_all_read();
  row.call.check_overlaps();
  check_limits(row);
  if (row.args.rows == 0) return;
  py::gil_scoped_release release;
  launch(row.args, to);
}

void cuda_scale_by_upstream_py(py::object grad, py::object upstream, py::object stream) {
  CallArgs call("cuda_scale_by_upstream", kFirstDevice);
  const TensorArg out = call.output(grad, "grad", kLogits, {kAny});
  const TensorArg factor = call.input(upstream, "upstream", kF32, {1});
  gpu::CudaLaunch to{};
  to.stream = static_cast<uintptr_t>(int_arg(call, stream, "stream", 0, INT64_MAX));
  to.device = call.device();
  call.check_overlaps();
  py::gil_scoped_release release;
  launch_scale(out.data, out.dtype(), out.numel(), static_cast<float*>(factor.data), to);
}

constexpr const char* kDoc =
    R"(cuda_row_pass(logits, labels, *, stream=0, bad_label=None, device_scale=None, **keywords of row_pass)

row_pass on CUDA tensors, without `threads`: launched on `stream` (cudaStream_t as an int) of the
tensors' device; returns at once and may be captured. hyper and bad_label are on the CPU.
device_scale [1]: a factor of dlogits. bad_label int64 [2], pinned: becomes (1, value * 2^32 + row)
when a label is outside [0, V) and not ignore_index; that row is NaN.)";

}  // namespace

void bind_cuda(py::module_& module) {
  module.def("cuda_row_pass", cuda_row_pass_py, kDoc);
  module.def(
      "cuda_scale_by_upstream", cuda_scale_by_upstream_py, py::arg("grad"), py::arg("upstream"),
      py::kw_only(), py::arg("stream") = 0,
      "grad [n] *= upstream [1] float32 in place on one CUDA device; returns at once, may be "
      "captured, touches nothing where upstream is 1.");
  module.def("cuda_why_not", why_not, py::arg("device"),
             "Why the CUDA kernels cannot run on this device; an empty string when they can.");
}

}  // namespace pyoffline
