// What one instruction set offers to the distillation driver: a table of functions, one object file
// each. Plain structs and function pointers, as in kernels.h.
#pragma once

#include "../distill.h"
#include "kernels.h"

namespace pyoffline {

// Two rows of one vocabulary as log-probs: log p = slope (y - offset) - log_d.
struct RowPair {
  RowInput student, teacher;
  float student_offset, teacher_offset;
  double student_d, teacher_d;
  double student_log_d, teacher_log_d;
};

// sum of exp(z - m) with the offset of m among these entries; sum 0 where none of them counts.
struct ApartSum {
  float offset;
  double sum;
};

struct DistillKernels {
  const char* name;
  // The sums of each divergence, in one sweep (RenyiDivergence: two).
  void (*sums)(const RowPair& pair, const DivergenceTerm* terms, int32_t n, DivergenceSums* out);
  // dlogits of the objective (null: none) and the divergences. out may start where student.logits
  // starts; its elements are then not larger. The label's element is written last.
  void (*gradient)(const RowPair& pair, const RowGradient* objective, int64_t label,
                   const DivergenceGradient* terms, int32_t n, DType type, void* out);
  // The first entry that holds the maximum y_max, or -1.
  int64_t (*argmax)(const RowInput& row, float y_max);
  // t = z - m and the derivative of the softcap at k entries.
  void (*gather)(const RowInput& row, float offset, const int64_t* ids, int64_t k, float* t,
                 float* damp);
  // The entries that are not among ids (ascending), relative to their own maximum.
  ApartSum (*sum_apart)(const RowInput& row, const int64_t* ids, int64_t k);
};

extern const DistillKernels portable_distill_kernels;
#if defined(__x86_64__)
extern const DistillKernels avx2_distill_kernels;
extern const DistillKernels avx512_distill_kernels;
#endif

}  // namespace pyoffline
