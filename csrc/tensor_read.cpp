// Memory facts of torch tensors and numpy arrays, taken from base-class descriptors.
//
// Calling `Tensor.data_ptr(x)` instead of `x.data_ptr()` makes overrides in subclasses and instance
// attributes irrelevant. A subclass is first viewed as a plain tensor with __torch_function__
// disabled; one that stays a subclass (FakeTensor, DTensor, functional wrappers) has no memory of
// its own and is refused.
#include "tensor_read.h"

#include <array>
#include <cstring>

namespace pyoffline {

namespace {

struct TorchApi {
  py::object tensor, parameter, as_subclass, no_function, strided, storage_ptr, storage_nbytes;
  py::object stride, data_ptr, storage, is_neg;
  std::vector<std::pair<py::object, Kind>> kinds;
};

struct NumpyApi {
  py::object array, interface, base;
};

py::object loaded_module(const char* name) {
  py::object module = py::reinterpret_steal<py::object>(PyImport_GetModule(py::str(name).ptr()));
  if (!module) PyErr_Clear();
  return module;
}

// Built at the first call after torch is imported, and never freed: descriptors live as long.
const TorchApi* torch_api() {
  static TorchApi* api = nullptr;
  if (api) return api;
  py::object torch = loaded_module("torch");
  if (!torch || !py::hasattr(torch, "UntypedStorage") || !py::hasattr(torch, "nn")) return nullptr;
  py::object base = torch.attr("_C").attr("TensorBase");
  api = new TorchApi{torch.attr("Tensor"),
                     torch.attr("nn").attr("Parameter"),
                     torch.attr("Tensor").attr("as_subclass"),
                     torch.attr("_C").attr("DisableTorchFunctionSubclass"),
                     torch.attr("strided"),
                     torch.attr("UntypedStorage").attr("data_ptr"),
                     torch.attr("UntypedStorage").attr("nbytes"),
                     base.attr("stride"),
                     base.attr("data_ptr"),
                     base.attr("untyped_storage"),
                     base.attr("is_neg"),
                     {}};
  const std::array<std::pair<const char*, Kind>, 7> names = {{{"float32", kF32},
                                                              {"bfloat16", kBF16},
                                                              {"float16", kF16},
                                                              {"float64", kF64},
                                                              {"int64", kI64},
                                                              {"uint8", kByte},
                                                              {"bool", kByte}}};
  for (const auto& [name, kind] : names) api->kinds.emplace_back(torch.attr(name), kind);
  return api;
}

const NumpyApi* numpy_api() {
  static NumpyApi* api = nullptr;
  if (api) return api;
  py::object numpy = loaded_module("numpy");
  if (!numpy || !py::hasattr(numpy, "ndarray")) return nullptr;
  py::object array = numpy.attr("ndarray");
  api = new NumpyApi{array, array.attr("__array_interface__"), array.attr("base")};
  return api;
}

py::object get(const py::object& descriptor, py::handle object) {
  return descriptor.attr("__get__")(object);
}

void read_sizes(py::handle sizes, py::handle strides, TensorArg& arg) {
  py::tuple shape = py::reinterpret_borrow<py::tuple>(sizes);
  py::tuple stride = py::reinterpret_borrow<py::tuple>(strides);
  arg.rank = static_cast<int>(shape.size());
  if (arg.rank > 2)
    throw ReadError{"at most 2 dimensions", std::to_string(arg.rank), "flatten the leading ones"};
  for (int i = 0; i < arg.rank; ++i) {
    arg.shape[i] = shape[i].cast<int64_t>();
    arg.stride[i] = stride[i].cast<int64_t>();
  }
}

// A storage without memory (zero tensors) refuses its pointer: its range is empty.
void read_storage(const TorchApi& api, py::handle object, TensorArg& arg) {
  py::object storage = api.storage(object);
  if (!api.data_ptr(object).cast<uintptr_t>()) return;
  arg.storage_begin = api.storage_ptr(storage).cast<uintptr_t>();
  arg.storage_end = arg.storage_begin + api.storage_nbytes(storage).cast<uintptr_t>();
}

void read_plain_torch(const TorchApi& api, py::handle object, TensorArg& arg) {
  // Data descriptors of the exact types torch.Tensor and Parameter: an instance attribute cannot
  // hide them.
  const py::object layout = object.attr("layout");
  if (!layout.is(api.strided) || object.attr("is_nested").cast<bool>())
    throw ReadError{"a strided tensor", "layout " + std::string(py::str(layout)),
                    "convert it to a dense tensor"};
  const py::object device = object.attr("device");
  const std::string kind = py::str(device.attr("type"));
  if (kind == "cuda") {
    arg.device = device.attr("index").cast<int>();
  } else if (kind != "cpu") {
    throw ReadError{"a tensor on cpu or cuda", "device " + kind, "move it with .cpu()"};
  }
  const py::object dtype = object.attr("dtype");
  bool known = false;
  for (const auto& [python, kind] : api.kinds)
    if (dtype.is(python)) arg.kind = kind, known = true;
  if (!known)
    throw ReadError{"a float32, bfloat16, float16, float64, int64, uint8 or bool tensor",
                    std::string(py::str(dtype)), "convert it with .to(dtype)"};
  if (api.is_neg(object).cast<bool>())
    throw ReadError{"a tensor that owns its sign", "a negative view", "call .resolve_neg()"};
  read_sizes(object.attr("shape"), api.stride(object), arg);
  read_storage(api, object, arg);
  arg.data = reinterpret_cast<void*>(api.data_ptr(object).cast<uintptr_t>());
}

py::object plain_torch(const TorchApi& api, py::handle object) {
  const py::handle type = py::type::handle_of(object);
  if (type.is(api.tensor) || type.is(api.parameter))
    return py::reinterpret_borrow<py::object>(object);
  py::object guard = api.no_function();
  guard.attr("__enter__")();
  py::object plain;
  try {
    plain = api.as_subclass(object, api.tensor);
  } catch (py::error_already_set&) {
    plain = py::none();
  }
  guard.attr("__exit__")(py::none(), py::none(), py::none());
  if (!py::type::handle_of(plain).is(api.tensor))
    throw ReadError{"a plain torch.Tensor", type_name(object),
                    "pass the local tensor that holds the data"};
  return plain;
}

void read_torch(const TorchApi& api, py::handle object, TensorArg& arg) {
  try {
    read_plain_torch(api, plain_torch(api, object), arg);
  } catch (py::builtin_exception& error) {  // a symbolic size
    throw ReadError{"concrete sizes", error.what(), "call outside tracing"};
  } catch (py::error_already_set& error) {
    throw ReadError{"a tensor with memory of its own", error.what(),
                    "call outside vmap, FakeTensorMode and tracing"};
  }
}

// The memory that an array may touch: that of the first owner along .base (as_strided makes views
// past their own shape). An owner that exports a buffer (mmap, bytes, ctypes) is asked; a tensor is
// read as one.
void read_numpy_storage(const NumpyApi& api, py::handle array, TensorArg& arg) {
  py::object owner = py::reinterpret_borrow<py::object>(array);
  py::object last = owner;
  while (!owner.is_none()) {
    last = owner;
    if (py::isinstance(owner, api.array)) {
      owner = get(api.base, owner);
    } else if (py::hasattr(owner, "base") && py::hasattr(owner, "__array_interface__")) {
      owner = owner.attr("base");  // as_strided's carrier
    } else {
      break;
    }
  }
  const TorchApi* torch = torch_api();
  if (torch && py::type::handle_of(last).is(torch->tensor)) {
    read_storage(*torch, last, arg);
    return;
  }
  Py_buffer view;
  if (PyObject_GetBuffer(last.ptr(), &view, PyBUF_STRIDED_RO) != 0) {
    PyErr_Clear();
    throw ReadError{"an array whose memory can be checked", "base " + type_name(last),
                    "copy it with numpy.array(x)"};
  }
  arg.storage_begin = reinterpret_cast<uintptr_t>(view.buf);
  arg.storage_end = arg.storage_begin + static_cast<uintptr_t>(view.len);
  PyBuffer_Release(&view);
}

void read_numpy(const NumpyApi& api, py::handle object, TensorArg& arg) {
  const py::dict facts = get(api.interface, object);
  const std::string type = py::str(facts["typestr"]);
  const std::array<std::pair<const char*, Kind>, 7> types = {{{"<f4", kF32},
                                                              {"<u2", kBF16},
                                                              {"<f2", kF16},
                                                              {"<f8", kF64},
                                                              {"<i8", kI64},
                                                              {"|u1", kByte},
                                                              {"|b1", kByte}}};
  bool known = false;
  for (const auto& [text, kind] : types)
    if (type == text) arg.kind = kind, known = true;
  if (!known)
    throw ReadError{"float32, float16, uint16 (bfloat16 bits), float64, int64, uint8 or bool",
                    "array type " + type, "convert it with .astype(dtype)"};
  const py::tuple data = facts["data"];
  arg.data = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
  arg.writable = !data[1].cast<bool>();
  const py::object shape = facts["shape"];
  py::object strides = facts["strides"];
  const int64_t item = arg.item_size();
  if (strides.is_none()) {
    const py::tuple sizes = shape;
    py::list dense;
    for (size_t i = 0; i < sizes.size(); ++i) {
      int64_t step = item;
      for (size_t j = i + 1; j < sizes.size(); ++j) step *= sizes[j].cast<int64_t>();
      dense.append(step);
    }
    strides = py::tuple(dense);
  }
  read_sizes(shape, strides, arg);
  for (int i = 0; i < arg.rank; ++i) {
    if (arg.stride[i] % item != 0)
      throw ReadError{"strides of whole elements", std::to_string(arg.stride[i]) + " bytes",
                      "copy it with numpy.ascontiguousarray(x)"};
    arg.stride[i] /= item;
  }
  read_numpy_storage(api, object, arg);
}

}  // namespace

bool read_tensor(py::handle object, TensorArg& arg) {
  const TorchApi* torch = torch_api();
  if (torch && py::isinstance(object, torch->tensor)) {
    read_torch(*torch, object, arg);
    return true;
  }
  const NumpyApi* numpy = numpy_api();
  if (numpy && py::isinstance(object, numpy->array)) {
    read_numpy(*numpy, object, arg);
    return true;
  }
  return false;
}

}  // namespace pyoffline
