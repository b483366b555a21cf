// The pieces of the extension module, one file each. Every function checks its arguments through
// CallArgs, releases the GIL, and calls one kernel.
#pragma once

#include "cpu/gemm.h"
#include "tensor_arg.h"

namespace pyoffline {

void bind_row_pass(py::module_& module);  // bind_row_pass.cpp: row_pass, score_rows, codes
void bind_cuda(py::module_& module);      // bind_cuda.cpp: cuda_*
void bind_gemm(py::module_& module);      // bind_gemm.cpp: gemm_*, set_gemm
void bind_distill(py::module_& module);   // bind_distill.cpp: distill_row_pass, divergence_codes

// An empty matrix may carry any stride: none of them is ever multiplied.
inline Matrix matrix(const TensorArg& arg) {
  return {arg.data, arg.dtype(), arg.shape[0], arg.shape[1],
          arg.numel() == 0 || arg.shape[0] == 1 ? arg.shape[1] : arg.stride[0]};
}

}  // namespace pyoffline
