// What a call of the row pass reads and writes: plain pointers and sizes, checked by row_call.cpp.
//
// One call handles C rows of V logits: softmax statistics, the objective program, and the gradient
// of each row. Every per-row array is contiguous fp32 of length `rows` unless said otherwise; null
// means absent.
#pragma once

#include <cstdint>

namespace pyoffline {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2 };

// One term of a composed objective; see docs/internals.md, "Programs".
struct Term {
  int32_t code;    // objectives.h, enum Code
  int32_t gate;    // index into RowArgs::extras, or -1
  int32_t anchor;  // 0 none, 1 ref, 2 old, 3 mu
  float scale;
  float params[6];
};

struct RowArgs {
  // logits [rows, vocab], unit stride in V; strides in elements of the own dtype
  const void* logits;
  DType logits_type;
  int64_t logits_stride;
  void* dlogits;  // null: statistics only; may start at the same address as the logits row
  DType dlogits_type;
  int64_t dlogits_stride;
  int64_t rows;
  int64_t vocab;

  // z = softcap(logit_scale * (logits + bias)) / temperature
  const float* bias;          // [vocab]
  const float* class_weight;  // [vocab], u of the gap
  const float* temperature;   // [rows]; else uniform_temperature
  float softcap;              // 0: none
  float logit_scale;
  float uniform_temperature;

  const int64_t* labels;  // [rows], each in [0, vocab) or ignore_index
  int64_t ignore_index;
  const float *weights, *old, *mu, *ref, *adv;  // [rows]
  const float* const* extras;                   // n_extras arrays [rows]
  int32_t n_extras;
  float grad_scale;

  const Term* terms;
  int32_t n_terms;
  const float* coefs;  // [4, rows] given (a, b, c, e) instead of terms

  float *loss, *logps, *entropy, *lse, *gap, *log_sum_p2;
  uint8_t* is_top1;
  float* coefs_out;  // [4, rows]
  int32_t threads;
};

}  // namespace pyoffline
