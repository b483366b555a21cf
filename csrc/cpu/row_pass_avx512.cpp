// The kernels for AVX-512 F/BW/VL/DQ; compiled with -mavx512f -mavx512bw -mavx512vl -mavx512dq
// -mfma -mf16c.
//
// Everything but the table below has internal linkage: a function that two object files share could
// be taken from the one whose instructions this CPU lacks. tests/cpp/row_pass_test.cpp says how to
// check. Not here: any algorithm (sweeps.h).
#if defined(__x86_64__)
#include "vec_avx512.h"  // defines Vec, which the kernels are written against
//
#include "array_kernels.h"

namespace pyoffline {

extern const Kernels avx512_kernels = {"avx512",   sums,       gradient,    exp_array,
                                       tanh_array, scale_cast, column_panel};

}  // namespace pyoffline
#endif
