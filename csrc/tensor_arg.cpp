// Checks of one call's tensors; see tensor_arg.h. Sizes and strides are user values up to 2^63 - 1,
// so every product and sum of them is formed in 128 bits.
#include "tensor_arg.h"

#include <algorithm>

#include "tensor_read.h"

namespace pyoffline {

namespace {

using Wide = __int128;

std::string kind_text(unsigned kinds) {
  const std::pair<Kind, const char*> names[] = {
      {kF32, "float32"}, {kBF16, "bfloat16 (uint16 in numpy)"},
      {kF16, "float16"}, {kF64, "float64"},
      {kI64, "int64"},   {kByte, "uint8 or bool"}};
  std::string text;
  for (const auto& [kind, name] : names)
    if (kinds & kind) text += (text.empty() ? "" : ", ") + std::string(name);
  return text;
}

// Bytes from the view's first to one past its last; 0 for an empty view. A term past 2^63 would
// overflow even 128 bits once multiplied: any such view is larger than memory.
Wide reach_nbytes(const TensorArg& arg) {
  if (arg.numel() == 0) return 0;
  Wide last = 0;
  for (int i = 0; i < arg.rank; ++i)
    last += std::min<Wide>(Wide(arg.shape[i] - 1) * arg.stride[i], INT64_MAX);
  return (last + 1) * arg.item_size();
}

bool ranges_meet(const TensorArg& a, const TensorArg& b) {
  return a.numel() != 0 && b.numel() != 0 && a.begin() < b.end() && b.begin() < a.end();
}

// Two matrices of one row pitch may interleave (left and right halves of a buffer) without sharing
// a byte.
bool overlap(const TensorArg& a, const TensorArg& b) {
  if (!ranges_meet(a, b)) return false;
  const int64_t pitch = a.row_stride_nbytes();
  if (pitch <= 0 || pitch != b.row_stride_nbytes()) return true;
  const bool a_first = a.begin() <= b.begin();
  const TensorArg &low = a_first ? a : b, &high = a_first ? b : a;
  const int64_t shift = static_cast<int64_t>((high.begin() - low.begin()) % uintptr_t(pitch));
  return shift < low.row_nbytes() || pitch - shift < high.row_nbytes();
}

}  // namespace

std::string type_name(py::handle object) {
  return py::str(py::type::handle_of(object).attr("__name__"));
}

std::string shape_text(const int64_t* sizes, int rank) {
  std::string text = "[";
  for (int i = 0; i < rank; ++i)
    text += (i ? ", " : "") + (sizes[i] == kAny ? std::string("any") : std::to_string(sizes[i]));
  return text + "]";
}

int64_t TensorArg::item_size() const {
  if (kind == kByte) return 1;
  if (kind == kBF16 || kind == kF16) return 2;
  return kind == kF32 ? 4 : 8;
}

// Saturates: sizes that overflow are not empty, and their extent is refused anyway.
int64_t TensorArg::numel() const {
  Wide count = 1;
  for (int i = 0; i < rank; ++i) count *= shape[i];
  return static_cast<int64_t>(std::min<Wide>(count, INT64_MAX));
}

DType TensorArg::dtype() const {
  if (kind == kBF16) return DType::bf16;
  return kind == kF16 ? DType::f16 : DType::f32;
}

int64_t TensorArg::row_nbytes() const { return (rank == 0 ? 1 : shape[rank - 1]) * item_size(); }

int64_t TensorArg::row_stride_nbytes() const {
  return rank == 2 && shape[0] > 1 ? stride[0] * item_size() : 0;
}

uintptr_t TensorArg::end() const { return begin() + static_cast<uintptr_t>(reach_nbytes(*this)); }

void CallArgs::fail(const std::string& name, const std::string& expected, const std::string& got,
                    const std::string& advice) const {
  throw py::value_error(function_ + ": " + name + ": expected " + expected + ", got " + got + "; " +
                        advice);
}

void CallArgs::fail_type(const std::string& name, const std::string& expected, py::handle got,
                         const std::string& advice) const {
  throw py::type_error(function_ + ": " + name + ": expected " + expected + ", got " +
                       type_name(got) + "; " + advice);
}

void CallArgs::check_device(const TensorArg& arg) {
  auto text = [](int device) {
    return device == kHost ? std::string("cpu") : "cuda:" + std::to_string(device);
  };
  if (device_ == kFirstDevice && arg.device != kHost) device_ = arg.device;
  if (arg.device == device_) return;
  const std::string wanted = device_ == kFirstDevice ? "a CUDA device" : text(device_);
  fail(arg.name, "a tensor on " + wanted, "device " + text(arg.device),
       device_ == kHost ? "move it with .cpu()" : "move it with .to(device)");
}

TensorArg CallArgs::read(py::handle object, const std::string& name) {
  TensorArg arg;
  bool tensor = false;
  try {
    tensor = read_tensor(object, arg);
  } catch (const ReadError& error) {
    fail(name, error.expected, error.got, error.advice);
  }
  if (!tensor)
    fail_type(name, "a torch.Tensor or numpy.ndarray", object,
              object.is_none() ? "this argument is required" : "convert it first");
  arg.name = name;
  arg.given = true;
  check_device(arg);
  // An empty tensor has no memory, and null means absent further down.
  static double nothing = 0;
  if (!arg.data && arg.numel() == 0) arg.data = &nothing;
  return arg;
}

void CallArgs::check_extent(const TensorArg& arg) const {
  if (arg.numel() == 0) return;
  const std::string view =
      "shape " + shape_text(arg.shape, arg.rank) + " strides " + shape_text(arg.stride, arg.rank);
  if (!arg.data || !arg.storage_begin)
    fail(arg.name, "memory for " + view, "a null pointer", "materialise the tensor first");
  const Wide begin = arg.begin(), last = begin + reach_nbytes(arg);
  if (begin < Wide(arg.storage_begin) || last > Wide(arg.storage_end))
    fail(arg.name,
         "a view inside its storage of " + std::to_string(arg.storage_end - arg.storage_begin) +
             " bytes",
         view, "the storage was resized or the view was made with wrong sizes: copy the data");
  if (arg.begin() % static_cast<uintptr_t>(arg.item_size()) != 0)
    fail(arg.name, "elements aligned to " + std::to_string(arg.item_size()) + " bytes",
         "an address that is not", "copy it with .clone()");
}

void CallArgs::check_kind(const TensorArg& arg, unsigned kinds) const {
  if (!(arg.kind & kinds))
    fail(arg.name, kind_text(kinds), kind_text(arg.kind), "convert it with .to(dtype)");
}

void CallArgs::check_writable(const TensorArg& arg) const {
  if (!arg.writable)
    fail(arg.name, "a writable output", "a read-only array", "allocate the output");
}

void CallArgs::check_dense(const TensorArg& arg) const {
  int64_t step = 1;
  for (int i = arg.rank - 1; i >= 0 && arg.numel() != 0; --i) {
    if (arg.shape[i] != 1 && arg.stride[i] != step)
      fail(arg.name, "contiguous memory", "strides " + shape_text(arg.stride, arg.rank),
           "call .contiguous()");
    step *= arg.shape[i];
  }
  check_extent(arg);
}

void CallArgs::check(const TensorArg& arg, unsigned kinds,
                     std::initializer_list<int64_t> sizes) const {
  check_kind(arg, kinds);
  const int rank = static_cast<int>(sizes.size());
  const bool shaped =
      arg.rank == rank && std::equal(sizes.begin(), sizes.end(), arg.shape,
                                     [](int64_t a, int64_t b) { return a == kAny || a == b; });
  if (!shaped)
    fail(arg.name, "shape " + shape_text(sizes.begin(), rank), shape_text(arg.shape, arg.rank),
         "the sizes must match the other arguments");
  for (int i = 0; i < rank; ++i)
    if (arg.stride[i] < 0)
      fail(arg.name, "strides of at least 0", shape_text(arg.stride, rank),
           "copy it with numpy.ascontiguousarray(x)");
  if (rank > 0 && arg.shape[rank - 1] > 1 && arg.stride[rank - 1] != 1 && arg.numel() != 0)
    fail(arg.name, "unit stride in the last dimension", "strides " + shape_text(arg.stride, rank),
         "call .contiguous()");
  check_extent(arg);
}

TensorArg CallArgs::input(py::handle object, const std::string& name, unsigned kinds,
                          std::initializer_list<int64_t> sizes, bool blas) {
  TensorArg arg = read(object, name);
  check(arg, kinds, sizes);
  if (blas && arg.numel() != 0 && arg.shape[0] > 1 && arg.stride[0] < arg.shape[1])
    fail(name, "a row stride of at least " + std::to_string(arg.shape[1]),
         std::to_string(arg.stride[0]), "call .contiguous()");
  inputs_.push_back(arg);
  return arg;
}

TensorArg CallArgs::output(py::handle object, const std::string& name, unsigned kinds,
                           std::initializer_list<int64_t> sizes) {
  TensorArg arg = read(object, name);
  check(arg, kinds, sizes);
  check_writable(arg);
  if (arg.rank == 2 && arg.numel() != 0 && arg.shape[0] > 1 && arg.stride[0] < arg.shape[1])
    fail(name, "output rows that do not overlap",
         "shape " + shape_text(arg.shape, 2) + " strides " + shape_text(arg.stride, 2),
         "allocate the output with torch.empty");
  outputs_.push_back(arg);
  return arg;
}

TensorArg CallArgs::maybe_input(py::handle object, const std::string& name, unsigned kinds,
                                std::initializer_list<int64_t> sizes) {
  return object.is_none() ? TensorArg{} : input(object, name, kinds, sizes);
}

TensorArg CallArgs::maybe_output(py::handle object, const std::string& name, unsigned kinds,
                                 std::initializer_list<int64_t> sizes) {
  return object.is_none() ? TensorArg{} : output(object, name, kinds, sizes);
}

TensorArg CallArgs::dense_input(py::handle object, const std::string& name, unsigned kinds) {
  TensorArg arg = read(object, name);
  check_kind(arg, kinds);
  check_dense(arg);
  inputs_.push_back(arg);
  return arg;
}

TensorArg CallArgs::dense_output(py::handle object, const std::string& name, unsigned kinds,
                                 const TensorArg& like) {
  TensorArg arg = read(object, name);
  check_kind(arg, kinds);
  if (arg.rank != like.rank || !std::equal(arg.shape, arg.shape + arg.rank, like.shape))
    fail(name, "shape " + shape_text(like.shape, like.rank), shape_text(arg.shape, arg.rank),
         "the sizes must match " + like.name);
  check_dense(arg);
  check_writable(arg);
  outputs_.push_back(arg);
  return arg;
}

void CallArgs::allow_in_place(const std::string& output, const std::string& input) {
  in_place_ = {output, input};
}

// Same start, same pitch, and no row of the output longer than the input row that it replaces.
bool CallArgs::in_place_pair(const TensorArg& output, const TensorArg& input) const {
  return output.name == in_place_.first && input.name == in_place_.second &&
         output.begin() == input.begin() &&
         output.row_stride_nbytes() == input.row_stride_nbytes() &&
         output.item_size() <= input.item_size();
}

void CallArgs::check_overlaps() const {
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const TensorArg& out = outputs_[i];
    for (const TensorArg& in : inputs_)
      if (overlap(out, in) && !in_place_pair(out, in))
        fail(out.name, "memory apart from " + in.name, "overlapping memory",
             "allocate the output with torch.empty");
    for (size_t j = 0; j < i; ++j)
      if (overlap(out, outputs_[j]))
        fail(out.name, "memory apart from " + outputs_[j].name, "overlapping memory",
             "give every output its own tensor");
  }
}

int64_t int_arg(const CallArgs& call, py::handle object, const std::string& name, int64_t low,
                int64_t high) {
  py::object index = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!index) {
    PyErr_Clear();
    call.fail_type(name, "an int", object, "pass a Python int");
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow || value < low || value > high)
    call.fail(name, "an int from " + std::to_string(low) + " to " + std::to_string(high),
              py::str(index), "pass a value in that range");
  return value;
}

bool bool_arg(const CallArgs& call, py::handle object, const std::string& name) {
  if (!PyBool_Check(object.ptr())) call.fail_type(name, "a bool", object, "pass True or False");
  return object.is(py::handle(Py_True));
}

int threads_arg(const CallArgs& call, py::handle threads) {
  return static_cast<int>(int_arg(call, threads, "threads", 1, 1024));
}

double float_arg(const CallArgs& call, py::handle object, const std::string& name) {
  const double value = PyFloat_AsDouble(object.ptr());
  if (value == -1.0 && PyErr_Occurred()) {
    PyErr_Clear();
    call.fail_type(name, "a float", object, "pass a Python float");
  }
  return value;
}

}  // namespace pyoffline
