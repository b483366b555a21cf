// The pieces of the extension module, one file each. Every function checks its arguments through
// CallArgs, releases the GIL, and calls one kernel.
#pragma once

#include "tensor_arg.h"

namespace pyoffline {

void bind_row_pass(py::module_& module);  // bind_row_pass.cpp: row_pass, codes
void bind_cuda(py::module_& module);      // bind_cuda.cpp: cuda_row_pass, cuda_why_not
void bind_gemm(py::module_& module);      // bind_gemm.cpp: gemm_*, set_gemm

}  // namespace pyoffline
