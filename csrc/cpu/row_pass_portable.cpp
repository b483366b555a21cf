// The kernels for any CPU: GCC vector extensions, the compiler's baseline flags.
//
// Everything but the table below has internal linkage: a function that two object files share could
// be taken from the one whose instructions this CPU lacks. tests/cpp/row_pass_test.cpp says how to
// check. Not here: any algorithm (sweeps.h).
#include "vec_portable.h"  // defines Vec, which the kernels are written against
//
#include "array_kernels.h"

namespace pyoffline {

extern const Kernels portable_kernels = {"portable", sums,       gradient,    exp_array,
                                         tanh_array, scale_cast, column_panel};

}  // namespace pyoffline
