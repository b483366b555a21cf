// What one call of the distillation row pass reads and writes; row_args.h has the student's side.
//
// Plain pointers and sizes, already checked by bind_distill.cpp.
#pragma once

#include <cstdint>

#include "distill.h"
#include "row_args.h"

namespace pyoffline {

struct DistillArgs {
  // The student's logits and head, the objective, dlogits and the row outputs. `loss` includes the
  // divergences, scaled and gated.
  RowArgs row;

  // The teacher's logits and head in the fields of a RowArgs (labels and weights are the student's,
  // outputs null); or, where k > 0, the teacher's k largest log-probs of each row.
  RowArgs teacher;
  const int64_t* topk_ids;  // [rows, k] ascending, each in [0, vocab)
  const float* topk_logps;  // [rows, k]
  const float* topk_tail;   // [rows] probability of all other entries
  int64_t k;

  const DivergenceTerm* divergences;
  int32_t n_divergences;

  float* values;            // [n_divergences, rows] before scale and gate
  float* teacher_entropy;   // [rows]; of the k + 1 buckets where k > 0
  uint8_t* top1_agreement;  // [rows] the teacher's largest logit is the student's
};

}  // namespace pyoffline
