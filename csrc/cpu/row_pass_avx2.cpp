// The kernels for AVX2, FMA and F16C; compiled with -mavx2 -mfma -mf16c.
//
// Everything but the table below has internal linkage: a function that two object files share could
// be taken from the one whose instructions this CPU lacks. tests/cpp/row_pass_test.cpp says how to
// check. Not here: any algorithm (sweeps.h).
#if defined(__x86_64__)
#include "vec_avx2.h"  // defines Vec, which the kernels are written against
//
#include "array_kernels.h"

namespace pyoffline {

extern const Kernels avx2_kernels = {"avx2",     sums,       gradient,    exp_array,
                                     tanh_array, scale_cast, column_panel};

}  // namespace pyoffline
#endif
