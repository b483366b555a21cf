// The CPU kernels that the bindings call: one set of functions, the widest ISA the CPU has.
//
// Arguments are already checked. `threads` is an upper bound: small work, a forked child and
// threads <= 1 run serially, and no result depends on the count. Nothing here allocates more than a
// row's worth of scratch. Not here: the GEMMs (gemm.cpp), argument checks (bind*.cpp).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "../row_args.h"

namespace pyoffline {

// Softmax statistics, objective program and gradient of each row; see row_pass.h.
void row_pass(const RowArgs& args);

// The same with divergences from a teacher's row; see distill.h.
struct DistillArgs;
void distill_row_pass(const DistillArgs& args);

// The instruction set in use, those this CPU can run (widest first), and a switch for tests.
// set_isa returns false and changes nothing when the name is unknown or the CPU lacks it.
// PYOFFLINE_ISA is read once, at first use: a name that set_isa would refuse is ignored there, and
// isa_override_error() says so ("" when all is well).
const char* isa();
std::vector<std::string> isas();
bool set_isa(const std::string& name);
std::string isa_override_error();

// The row pass's own elementary functions on arrays, for the ULP tests.
enum class VecFn { exp, tanh, log };
void vector_fn(VecFn fn, const float* x, float* out, int64_t n);

// dst = cast(src * scale), round to nearest even, NaN stays NaN. src and dst may be the same array
// of one dtype.
void scale_cast(const void* src, DType src_type, void* dst, DType dst_type, int64_t n, float scale,
                int threads);
void scale_cast_2d(const float* src, int64_t src_stride, void* dst, DType dst_type,
                   int64_t dst_stride, int64_t rows, int64_t cols, float scale, int threads);

// out[cols] fp32 = (accumulate ? out : 0) + the sum of x [rows, cols] over rows, in a fixed order.
void column_sum(const void* x, DType type, int64_t stride, int64_t rows, int64_t cols, float* out,
                bool accumulate, int threads);

// sum(values * weights) in fp64, a fixed order, without entries of weight 0; weights may be null.
double weighted_sum(const float* values, const float* weights, int64_t n);

// name -> enum Code, in the order of objectives.h.
const std::vector<std::pair<std::string, int>>& objective_codes();

}  // namespace pyoffline
