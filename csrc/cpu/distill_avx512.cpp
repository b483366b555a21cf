// The distillation sweeps for AVX-512 F/BW/VL/DQ; flags in setup.py.
//
// Everything but the table below has internal linkage, as in row_pass_avx512.cpp. Not here: any
// algorithm (distill_sweeps.h).
#if defined(__x86_64__)
// sweeps.h also holds the one-row sweeps, which row_pass_*.cpp hands out.
#pragma GCC diagnostic ignored "-Wunused-function"
#include "vec_avx512.h"  // defines Vec, which the sweeps are written against
//
#include "distill_sweeps.h"

namespace pyoffline {

extern const DistillKernels avx512_distill_kernels = {"avx512", pair_sums, pair_gradient,
                                                      argmax,   gather,    sum_apart};

}  // namespace pyoffline
#endif
