// What one instruction set offers to the row driver: a table of functions, one object file each.
//
// Plain structs and function pointers: nothing here may emit code, because this header is compiled
// under every ISA's flags.
#pragma once

#include <stdint.h>

#include "../row_args.h"

namespace pyoffline {

struct RowSums;
struct RowGradient;

// One row of logits and how z follows from it. The ordered coordinate is y = sign * (logit + bias),
// which grows with z:
//   inner == 0:  z = slope y                 z - m = slope (y - max y)
//   inner != 0:  z = slope tanh(inner y)     z - m = slope (tanh(inner y) - tanh(inner max y))
struct RowInput {
  const void* logits;
  DType type;
  int64_t vocab;
  const float* bias;          // [vocab] or null
  const float* class_weight;  // [vocab] or null
  float sign;
  float slope;       // |logit_scale| / T, or softcap / T
  float inner;       // |logit_scale| / softcap, or 0
  const void* next;  // the row after this one, to be pulled into L2; null: none
};

struct Kernels {
  const char* name;
  void (*sums)(const RowInput& row, int64_t label, int level, RowSums* out);
  // out may start where row.logits starts; its elements are then not larger. The label's element is
  // written last.
  void (*gradient)(const RowInput& row, const RowSums& sums, const RowGradient& constants,
                   int64_t label, DType type, void* out);
  void (*exp)(const float* x, float* out, int64_t n);
  void (*tanh)(const float* x, float* out, int64_t n);
  void (*scale_cast)(const void* src, DType src_type, void* dst, DType dst_type, int64_t n,
                     float scale);
  // cols <= kPanel columns of x [rows, cols], summed over rows in fp64
  void (*column_panel)(const void* x, DType type, int64_t stride, int64_t rows, int64_t cols,
                       double* out);
};

constexpr int64_t kPanel = 2048;

// Defined where the compiler can build them; dispatch.cpp asks the CPU before it touches one.
extern const Kernels portable_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#endif

}  // namespace pyoffline
