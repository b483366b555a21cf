// What every driver of rows shares: the plan of a call, where a row's inputs are, where its results
// go, and the objective.
//
// Compiled for the baseline CPU only. Not here: loops over rows (row_pass.cpp, score.cpp), vector
// code (sweeps.h).
#pragma once

#include <cmath>
#include <limits>

#include "../row_pass.h"
#include "dispatch_internal.h"

namespace pyoffline {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

inline int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// What is the same for every row of a call.
struct Plan {
  const RowArgs& args;
  const Kernels& kernels;
  int level;          // of RowSums, for the outputs and the program
  bool writes_stats;  // any output besides dlogits, or a program to evaluate
  double sum_u;       // of the class weights
};

inline double sum_class_weights(const RowArgs& args) {
  if (!args.class_weight) return static_cast<double>(args.vocab);
  double sums[4] = {0, 0, 0, 0};
  for (int64_t v = 0; v < args.vocab; ++v) sums[v & 3] += args.class_weight[v];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

inline Plan make_plan(const RowArgs& args) {
  int level = args.entropy || args.log_sum_p2 ? 1 : 0;
  if (args.gap) level = 2;
  for (int32_t k = 0; k < args.n_terms; ++k) {
    const Term& term = args.terms[k];
    if (term.scale == 0.0f) continue;
    if (term.code == entropy_term_code && level < 1) level = 1;
    if (term.code == smoothing_code) level = 2;
  }
  const bool writes_stats = !args.coefs || args.loss || args.logps || args.entropy || args.lse ||
                            args.gap || args.log_sum_p2 || args.is_top1;
  return {args, active_kernels(), level, writes_stats, sum_class_weights(args)};
}

inline bool is_counted(const RowArgs& args, int64_t row) {
  return args.labels[row] != args.ignore_index && !(args.weights && args.weights[row] == 0.0f);
}

inline double temperature_of(const RowArgs& args, int64_t row) {
  return args.temperature ? args.temperature[row] : args.uniform_temperature;
}

// Everything but where the row and the next one lie.
inline RowInput describe(const RowArgs& args, int64_t row) {
  RowInput in;
  in.type = args.logits_type;
  in.vocab = args.vocab;
  in.bias = args.bias;
  in.class_weight = args.class_weight;
  const double scale = args.logit_scale, temperature = temperature_of(args, row);
  in.sign = scale / temperature < 0.0 ? -1.0f : 1.0f;
  if (args.softcap != 0.0f) {
    in.slope = static_cast<float>(args.softcap / std::fabs(temperature));
    in.inner = static_cast<float>(std::fabs(scale) / args.softcap);
  } else {
    in.slope = static_cast<float>(std::fabs(scale / temperature));
    in.inner = 0.0f;
  }
  in.logits = in.next = nullptr;
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

inline Coefs evaluate(const RowArgs& args, int64_t row, const RowStats& stats) {
  auto at = [row](const float* x) { return x ? x[row] : kNan; };
  const TokenIn token = {
      stats.logp,   stats.entropy, stats.lse,    stats.gap,
      at(args.old), at(args.mu),   at(args.ref), args.adv ? args.adv[row] : 1.0f};
  return evaluate_program(args.terms, args.n_terms, token, args.extras, row);
}

}  // namespace pyoffline
