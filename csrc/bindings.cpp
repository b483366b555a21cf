// The extension module pyoffline._C: its small functions, and the list of its parts.
//
// Loading it does nothing but register functions: no thread starts, no floating-point mode changes,
// torch is not imported. The contract of every function is in docs/internals.md.
#include "bindings.h"

#include <sys/mman.h>
#include <unistd.h>

#include "cpu/dispatch.h"
#include "cpu/scratch.h"

namespace pyoffline {

namespace {

// Raised by one whenever a signature or an argument's meaning changes.
constexpr int kAbi = 1;

void column_sum_py(py::object dlogits, py::object out, py::object accumulate, py::object threads) {
  CallArgs call("column_sum");
  const TensorArg x = call.input(dlogits, "dlogits", kLogits, {kAny, kAny});
  const TensorArg sums = call.output(out, "out", kF32, {x.shape[1]});
  const bool adds = bool_arg(call, accumulate, "accumulate");
  const int count = threads_arg(call, threads);
  call.check_overlaps();
  py::gil_scoped_release release;
  column_sum(x.data, x.dtype(), x.stride[0], x.shape[0], x.shape[1], static_cast<float*>(sums.data),
             adds, count);
}

double weighted_sum_py(py::object values, py::object weights) {
  CallArgs call("weighted_sum");
  const TensorArg x = call.input(values, "values", kF32, {kAny});
  const TensorArg w = call.maybe_input(weights, "weights", kF32, {x.shape[0]});
  py::gil_scoped_release release;
  return weighted_sum(static_cast<const float*>(x.data), static_cast<const float*>(w.data),
                      x.shape[0]);
}

// Any contiguous pair of equal shapes: read as flat vectors.
void scale_cast_py(py::object src, py::object out, py::object scale, py::object threads) {
  CallArgs call("scale_cast");
  const TensorArg in = call.dense_input(src, "src", kLogits);
  const TensorArg to = call.dense_output(out, "out", kLogits, in);
  const float factor = static_cast<float>(float_arg(call, scale, "scale"));
  if (in.kind == to.kind) call.allow_in_place("out", "src");
  const int count = threads_arg(call, threads);
  call.check_overlaps();
  py::gil_scoped_release release;
  scale_cast(in.data, in.dtype(), to.data, to.dtype(), in.numel(), factor, count);
}

void vector_py(VecFn fn, const char* name, py::object x, py::object out) {
  CallArgs call(name);
  const TensorArg in = call.input(x, "x", kF32, {kAny});
  const TensorArg to = call.output(out, "out", kF32, {in.shape[0]});
  call.check_overlaps();
  py::gil_scoped_release release;
  vector_fn(fn, static_cast<const float*>(in.data), static_cast<float*>(to.data), in.shape[0]);
}

void advise_hugepages_py(py::object tensor) {
  CallArgs call("advise_hugepages");
  const TensorArg arg = call.dense_input(tensor, "tensor", kLogits | kF64 | kI64 | kByte);
#ifdef MADV_HUGEPAGE
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (arg.begin() + page - 1) / page * page, end = arg.end() / page * page;
  // Advice: a kernel without huge pages refuses it, and nothing is lost.
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A block as Python's buffer protocol shows it: a tensor made from it holds it for its own life.
class ScratchBuffer {
 public:
  explicit ScratchBuffer(py::ssize_t nbytes) : nbytes_(nbytes), scratch_(checked(nbytes)) {}
  py::buffer_info info() {
    return {scratch_.get(), 1, py::format_descriptor<uint8_t>::format(), nbytes_};
  }

 private:
  static size_t checked(py::ssize_t nbytes) {
    if (nbytes < 0) throw py::value_error("scratch: nbytes: expected at least 0");
    return static_cast<size_t>(nbytes);
  }
  py::ssize_t nbytes_;
  Scratch scratch_;
};

void bind_scratch(py::module_& module) {
  py::class_<ScratchBuffer>(module, "scratch", py::buffer_protocol(),
                            "Writable memory that is kept for the next call when dropped.")
      .def(py::init<py::ssize_t>(), py::arg("nbytes"))
      .def_buffer(&ScratchBuffer::info);
  module.def("release_scratch", release_scratch, "Unmaps idle scratch; returns its bytes.");
}

void set_isa_py(const std::string& name) {
  if (set_isa(name)) return;
  std::string known;
  for (const std::string& each : isas()) known += (known.empty() ? "" : ", ") + each;
  throw py::value_error("set_isa: name: expected one of " + known + ", got " + name +
                        "; this CPU runs only those");
}

void bind_small(py::module_& module) {
  module.def("column_sum", column_sum_py, py::arg("dlogits"), py::arg("out"), py::kw_only(),
             py::arg("accumulate") = false, py::arg("threads") = 1,
             "out[V] float32 (+)= dlogits[C,V].sum(0), in a fixed order.");
  module.def(
      "weighted_sum", weighted_sum_py, py::arg("values"), py::arg("weights"),
      "sum(values * weights) in float64, in a fixed order; an entry of weight 0 is skipped.");
  module.def("scale_cast", scale_cast_py, py::arg("src"), py::arg("out"), py::arg("scale"),
             py::kw_only(), py::arg("threads") = 1, "out = cast(src * scale), contiguous.");
  module.def("advise_hugepages", advise_hugepages_py, py::arg("tensor"),
             "Asks for huge pages under the page-aligned inside of a contiguous tensor.");
  module.def(
      "vector_exp",
      [](py::object x, py::object out) { vector_py(VecFn::exp, "vector_exp", x, out); },
      py::arg("x"), py::arg("out"), "The row pass's exp on a float32 vector.");
  module.def(
      "vector_tanh",
      [](py::object x, py::object out) { vector_py(VecFn::tanh, "vector_tanh", x, out); },
      py::arg("x"), py::arg("out"), "The row pass's tanh on a float32 vector.");
  module.def(
      "vector_log",
      [](py::object x, py::object out) { vector_py(VecFn::log, "vector_log", x, out); },
      py::arg("x"), py::arg("out"), "The row pass's log on a float32 vector.");
}

}  // namespace

}  // namespace pyoffline

PYBIND11_MODULE(_C, module) {
  using namespace pyoffline;
  module.doc() = "CPU and CUDA kernels of pyoffline; the contract is in docs/internals.md.";
  bind_row_pass(module);
  bind_cuda(module);
  bind_gemm(module);
  bind_distill(module);
  bind_small(module);
  bind_scratch(module);
  module.def("isa", [] { return std::string(isa()); }, "The instruction set in use.");
  module.def(
      "isas",
      [] {
        py::list names;
        for (const std::string& name : isas()) names.append(name);
        return names;
      },
      "The instruction sets that this CPU runs, widest first.");
  module.def("set_isa", set_isa_py, py::arg("name"), "Switches the instruction set (tests).");
  module.def("isa_override_error", isa_override_error,
             "Why PYOFFLINE_ISA was ignored, or an empty string.");
  module.def("abi", [] { return kAbi; }, "Version of this module's contract.");
}
