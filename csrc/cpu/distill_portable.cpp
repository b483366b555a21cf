// The distillation sweeps for any CPU: GCC vector extensions, the compiler's baseline flags.
//
// Everything but the table below has internal linkage, as in row_pass_portable.cpp. Not here: any
// algorithm (distill_sweeps.h).

// sweeps.h also holds the one-row sweeps, which row_pass_*.cpp hands out.
#pragma GCC diagnostic ignored "-Wunused-function"
#include "vec_portable.h"  // defines Vec, which the sweeps are written against
//
#include "distill_sweeps.h"

namespace pyoffline {

extern const DistillKernels portable_distill_kernels = {"portable", pair_sums, pair_gradient,
                                                        argmax,     gather,    sum_apart};

}  // namespace pyoffline
