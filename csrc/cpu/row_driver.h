// What the row drivers do once a row, for the baseline files of this directory: which rows count,
// where a row lies, how z follows from it, its outputs.
//
// Included by row_pass.cpp and distill_row_pass.cpp only, which are compiled for one and the same
// CPU. Not here: the loop over rows, any sweep.
#pragma once

#include <math.h>
#include <string.h>

#include <limits>

#include "../row_pass.h"
#include "half_bits.h"
#include "kernels.h"

namespace pyoffline {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

inline bool is_counted(const RowArgs& args, int64_t row) {
  return args.labels[row] != args.ignore_index && !(args.weights && args.weights[row] == 0.0f);
}

inline const char* logits_row(const RowArgs& args, int64_t row) {
  return static_cast<const char*>(args.logits) +
         row * args.logits_stride * size_of(args.logits_type);
}

inline char* dlogits_row(const RowArgs& args, int64_t row) {
  return static_cast<char*>(args.dlogits) + row * args.dlogits_stride * size_of(args.dlogits_type);
}

inline double temperature_of(const RowArgs& args, int64_t row) {
  return args.temperature ? args.temperature[row] : args.uniform_temperature;
}

inline RowInput describe(const RowArgs& args, int64_t row, int64_t run_end) {
  RowInput in;
  in.logits = logits_row(args, row);
  in.type = args.logits_type;
  in.vocab = args.vocab;
  in.bias = args.bias;
  in.class_weight = args.class_weight;
  const double scale = args.logit_scale, temperature = temperature_of(args, row);
  in.sign = scale / temperature < 0.0 ? -1.0f : 1.0f;
  if (args.softcap != 0.0f) {
    in.slope = static_cast<float>(args.softcap / fabs(temperature));
    in.inner = static_cast<float>(fabs(scale) / args.softcap);
  } else {
    in.slope = static_cast<float>(fabs(scale / temperature));
    in.inner = 0.0f;
  }
  ++row;
  in.next = row < run_end && is_counted(args, row) ? logits_row(args, row) : nullptr;
  return in;
}

inline void write_stats(const RowArgs& args, int64_t row, const RowStats& stats) {
  if (args.logps) args.logps[row] = stats.logp;
  if (args.entropy) args.entropy[row] = stats.entropy;
  if (args.lse) args.lse[row] = stats.lse;
  if (args.gap) args.gap[row] = stats.gap;
  if (args.log_sum_p2) args.log_sum_p2[row] = stats.log_sum_p2;
  if (args.is_top1) args.is_top1[row] = stats.is_top1;
}

inline void write_coefs(const RowArgs& args, int64_t row, const Coefs& coefs) {
  if (args.loss) args.loss[row] = coefs.loss;
  if (!args.coefs_out) return;
  const float values[4] = {coefs.a, coefs.b, coefs.c, coefs.e};
  for (int k = 0; k < 4; ++k) args.coefs_out[k * args.rows + row] = values[k];
}

inline void zero_dlogits(const RowArgs& args, int64_t row) {
  if (args.dlogits) memset(dlogits_row(args, row), 0, args.vocab * size_of(args.dlogits_type));
}

inline void nan_dlogits(const RowArgs& args, int64_t row) {
  char* out = dlogits_row(args, row);
  for (int64_t v = 0; v < args.vocab; ++v) {
    if (args.dlogits_type == DType::f32) from_float(kNan, reinterpret_cast<float*>(out) + v);
    if (args.dlogits_type == DType::bf16) from_float(kNan, reinterpret_cast<bf16*>(out) + v);
    if (args.dlogits_type == DType::f16) from_float(kNan, reinterpret_cast<f16*>(out) + v);
  }
}

inline Coefs given_coefs(const RowArgs& args, int64_t row) {
  const float* c = args.coefs + row;
  return {0.0f, c[0], c[args.rows], c[2 * args.rows], c[3 * args.rows]};
}

inline Coefs evaluate(const RowArgs& args, int64_t row, const RowStats& stats) {
  auto at = [row](const float* x) { return x ? x[row] : kNan; };
  const TokenIn token = {
      stats.logp,   stats.entropy, stats.lse,    stats.gap,
      at(args.old), at(args.mu),   at(args.ref), args.adv ? args.adv[row] : 1.0f};
  return evaluate_program(args.terms, args.n_terms, token, args.extras, row);
}

inline bool all_zero(const Coefs& c) { return c.a == 0 && c.b == 0 && c.c == 0 && c.e == 0; }

// The level of RowSums that the outputs and the program need.
inline int sums_level(const RowArgs& args) {
  int level = args.entropy || args.log_sum_p2 ? 1 : 0;
  if (args.gap) level = 2;
  for (int32_t k = 0; k < args.n_terms; ++k) {
    const Term& term = args.terms[k];
    if (term.scale == 0.0f) continue;
    if (term.code == entropy_term_code && level < 1) level = 1;
    if (term.code == smoothing_code) level = 2;
  }
  return level;
}

}  // namespace
}  // namespace pyoffline
