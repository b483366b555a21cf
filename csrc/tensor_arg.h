// The arguments of one binding call: read from Python objects, checked, kept to look for overlaps.
//
// A torch tensor or numpy array is read through the base class's own descriptors, so that neither a
// subclass nor an attribute of the instance can lie about memory, and every extent is checked
// against the storage that holds it. ValueError (TypeError for a wrong kind) says function,
// argument, expected, got, what to do. No torch headers.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include "row_args.h"

namespace pyoffline {

namespace py = pybind11;

// Bits, so that an argument can allow several.
enum Kind : unsigned {
  kF32 = 1,
  kBF16 = 2,
  kF16 = 4,
  kF64 = 8,
  kI64 = 16,
  kByte = 32,
  kLogits = kF32 | kBF16 | kF16,
};

// A size that is read, not demanded.
constexpr int64_t kAny = -1;

// Where a call's tensors must be: a CUDA device's index, the CPU, or the device of the first one.
constexpr int kHost = -1;
constexpr int kFirstDevice = -2;

struct TensorArg {
  std::string name;
  void* data = nullptr;  // null: the argument is None
  Kind kind = kF32;
  int rank = 0;
  int64_t shape[2] = {0, 0};
  int64_t stride[2] = {0, 0};  // elements
  bool writable = true;
  int device = kHost;  // or the index of a CUDA device
  uintptr_t storage_begin = 0, storage_end = 0;
  bool given = false;

  explicit operator bool() const { return given; }
  int64_t item_size() const;
  int64_t numel() const;
  DType dtype() const;  // of a kLogits kind
  int64_t row_nbytes() const;
  int64_t row_stride_nbytes() const;
  uintptr_t begin() const { return reinterpret_cast<uintptr_t>(data); }
  uintptr_t end() const;  // one past the last byte that the view reaches
};

class CallArgs {
 public:
  explicit CallArgs(const char* function, int device = kHost)
      : function_(function), device_(device) {}
  const std::string& function() const { return function_; }
  int device() const { return device_; }

  // What is read inside this scope must be on the CPU.
  class HostScope {
   public:
    explicit HostScope(CallArgs& call) : call_(call), before_(call.device_) {
      call.device_ = kHost;
    }
    ~HostScope() { call_.device_ = before_; }
    HostScope(const HostScope&) = delete;
    HostScope& operator=(const HostScope&) = delete;

   private:
    CallArgs& call_;
    int before_;
  };

  // Rank = number of sizes; the last dimension has unit stride, so that a [n] array is contiguous.
  // A matrix may have any row stride (`blas`, outputs: of at least a row's length).
  TensorArg input(py::handle object, const std::string& name, unsigned kinds,
                  std::initializer_list<int64_t> sizes, bool blas = false);
  TensorArg output(py::handle object, const std::string& name, unsigned kinds,
                   std::initializer_list<int64_t> sizes);
  // Optional: None gives an argument that is false.
  TensorArg maybe_input(py::handle object, const std::string& name, unsigned kinds,
                        std::initializer_list<int64_t> sizes);
  TensorArg maybe_output(py::handle object, const std::string& name, unsigned kinds,
                         std::initializer_list<int64_t> sizes);

  // Contiguous tensors of at most two dimensions, as flat memory; the output has `like`'s shape.
  TensorArg dense_input(py::handle object, const std::string& name, unsigned kinds);
  TensorArg dense_output(py::handle object, const std::string& name, unsigned kinds,
                         const TensorArg& like);

  // No output may share a byte with another argument, but for the one pair allowed in place.
  void allow_in_place(const std::string& output, const std::string& input);
  void check_overlaps() const;

  [[noreturn]] void fail(const std::string& name, const std::string& expected,
                         const std::string& got, const std::string& advice) const;
  [[noreturn]] void fail_type(const std::string& name, const std::string& expected, py::handle got,
                              const std::string& advice) const;

 private:
  TensorArg read(py::handle object, const std::string& name);
  void check_device(const TensorArg& arg);
  void check_kind(const TensorArg& arg, unsigned kinds) const;
  void check(const TensorArg& arg, unsigned kinds, std::initializer_list<int64_t> sizes) const;
  void check_dense(const TensorArg& arg) const;
  void check_writable(const TensorArg& arg) const;
  void check_extent(const TensorArg& arg) const;
  bool in_place_pair(const TensorArg& output, const TensorArg& input) const;

  std::string function_;
  int device_;
  std::vector<TensorArg> inputs_, outputs_;
  std::pair<std::string, std::string> in_place_;
};

std::string type_name(py::handle object);
std::string shape_text(const int64_t* sizes, int rank);
// Scalars arrive as objects and are converted here: pybind's own error would print every argument,
// and printing an array reads whatever its strides say.
int64_t int_arg(const CallArgs& call, py::handle object, const std::string& name, int64_t low,
                int64_t high);
bool bool_arg(const CallArgs& call, py::handle object, const std::string& name);
int threads_arg(const CallArgs& call, py::handle threads);  // 1 to 1024
double float_arg(const CallArgs& call, py::handle object, const std::string& name);

}  // namespace pyoffline
