// Reads memory facts from a torch tensor or a numpy array; see tensor_arg.h. Throws ReadError with
// the reason.
#pragma once

#include <stdexcept>
#include <string>

#include "tensor_arg.h"

namespace pyoffline {

// What a tensor is that we cannot use: (expected, got, advice) of the error that CallArgs raises.
struct ReadError {
  std::string expected, got, advice;
};

// False when the object is neither a torch tensor nor a numpy array. Fills all but name and given.
bool read_tensor(py::handle object, TensorArg& arg);

}  // namespace pyoffline
