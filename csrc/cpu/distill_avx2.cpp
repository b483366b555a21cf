// The distillation sweeps for AVX2, FMA and F16C; flags in setup.py.
//
// Everything but the table below has internal linkage, as in row_pass_avx2.cpp. Not here: any
// algorithm (distill_sweeps.h).
#if defined(__x86_64__)
// sweeps.h also holds the one-row sweeps, which row_pass_*.cpp hands out.
#pragma GCC diagnostic ignored "-Wunused-function"
#include "vec_avx2.h"  // defines Vec, which the sweeps are written against
//
#include "distill_sweeps.h"

namespace pyoffline {

extern const DistillKernels avx2_distill_kernels = {"avx2", pair_sums, pair_gradient,
                                                    argmax, gather,    sum_apart};

}  // namespace pyoffline
#endif
