// The row driver: for each row, sums -> statistics -> objective -> gradient constants -> dlogits,
// all by one thread.
//
// A row's result depends on that row alone, so it is the same for every thread count and position.
// Rows are handed out in runs, because a row's sweeps pull the next one of the run into L2. An
// ignored row, or one of weight 0, is never read. Compiled for the baseline CPU; the sweeps come
// from the table of the chosen instruction set. Not here: argument checks.
#include "../row_pass.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "dispatch.h"
#include "dispatch_internal.h"
#include "half_bits.h"
#include "parallel.h"

namespace pyoffline {

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// What is the same for every row of a call.
struct Plan {
  const RowArgs& args;
  const Kernels& kernels;
  int level;          // of RowSums, for the outputs and the program
  bool writes_stats;  // any output besides dlogits, or a program to evaluate
  double sum_u;       // of the class weights
};

double sum_class_weights(const RowArgs& args) {
  if (!args.class_weight) return static_cast<double>(args.vocab);
  double sums[4] = {0, 0, 0, 0};
  for (int64_t v = 0; v < args.vocab; ++v) sums[v & 3] += args.class_weight[v];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

Plan make_plan(const RowArgs& args) {
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

bool is_counted(const RowArgs& args, int64_t row) {
  return args.labels[row] != args.ignore_index && !(args.weights && args.weights[row] == 0.0f);
}

const char* logits_row(const RowArgs& args, int64_t row) {
  return static_cast<const char*>(args.logits) +
         row * args.logits_stride * size_of(args.logits_type);
}

char* dlogits_row(const RowArgs& args, int64_t row) {
  return static_cast<char*>(args.dlogits) + row * args.dlogits_stride * size_of(args.dlogits_type);
}

double temperature_of(const RowArgs& args, int64_t row) {
  return args.temperature ? args.temperature[row] : args.uniform_temperature;
}

RowInput describe(const RowArgs& args, int64_t row, int64_t run_end) {
  RowInput in;
  in.logits = logits_row(args, row);
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
  ++row;
  in.next = row < run_end && is_counted(args, row) ? logits_row(args, row) : nullptr;
  return in;
}

void write_stats(const RowArgs& args, int64_t row, const RowStats& stats) {
  if (args.logps) args.logps[row] = stats.logp;
  if (args.entropy) args.entropy[row] = stats.entropy;
  if (args.lse) args.lse[row] = stats.lse;
  if (args.gap) args.gap[row] = stats.gap;
  if (args.log_sum_p2) args.log_sum_p2[row] = stats.log_sum_p2;
  if (args.is_top1) args.is_top1[row] = stats.is_top1;
}

void write_coefs(const RowArgs& args, int64_t row, const Coefs& coefs) {
  if (args.loss) args.loss[row] = coefs.loss;
  if (!args.coefs_out) return;
  const float values[4] = {coefs.a, coefs.b, coefs.c, coefs.e};
  for (int k = 0; k < 4; ++k) args.coefs_out[k * args.rows + row] = values[k];
}

void zero_dlogits(const RowArgs& args, int64_t row) {
  if (args.dlogits) std::memset(dlogits_row(args, row), 0, args.vocab * size_of(args.dlogits_type));
}

void nan_dlogits(const RowArgs& args, int64_t row) {
  char* out = dlogits_row(args, row);
  for (int64_t v = 0; v < args.vocab; ++v) {
    if (args.dlogits_type == DType::f32) from_float(kNan, reinterpret_cast<float*>(out) + v);
    if (args.dlogits_type == DType::bf16) from_float(kNan, reinterpret_cast<bf16*>(out) + v);
    if (args.dlogits_type == DType::f16) from_float(kNan, reinterpret_cast<f16*>(out) + v);
  }
}

Coefs given_coefs(const RowArgs& args, int64_t row) {
  const float* c = args.coefs + row;
  return {0.0f, c[0], c[args.rows], c[2 * args.rows], c[3 * args.rows]};
}

Coefs evaluate(const RowArgs& args, int64_t row, const RowStats& stats) {
  auto at = [row](const float* x) { return x ? x[row] : kNan; };
  const TokenIn token = {
      stats.logp,   stats.entropy, stats.lse,    stats.gap,
      at(args.old), at(args.mu),   at(args.ref), args.adv ? args.adv[row] : 1.0f};
  return evaluate_program(args.terms, args.n_terms, token, args.extras, row);
}

bool all_zero(const Coefs& c) { return c.a == 0 && c.b == 0 && c.c == 0 && c.e == 0; }

void write_gradient(const Plan& plan, int64_t row, const RowInput& in, const Coefs& coefs,
                    const RowSums& sums, const RowStats& stats) {
  const RowArgs& args = plan.args;
  const double weight = args.weights ? args.weights[row] : 1.0;
  const double factor = weight * args.grad_scale * args.logit_scale / temperature_of(args, row);
  const int64_t label = args.labels[row];
  const double u_label = args.class_weight ? args.class_weight[label] : 1.0;
  const double mean_u = plan.sum_u / static_cast<double>(args.vocab);
  const RowGradient constants =
      gradient_constants(coefs, sums, stats, factor, args.vocab, mean_u, u_label);
  if (constants.is_nan) {
    nan_dlogits(args, row);
  } else {
    plan.kernels.gradient(in, sums, constants, label, args.dlogits_type, dlogits_row(args, row));
  }
}

void run_row(const Plan& plan, int64_t row, int64_t run_end) {
  const RowArgs& args = plan.args;
  if (!is_counted(args, row)) {
    write_stats(args, row, RowStats{});
    write_coefs(args, row, Coefs{});
    zero_dlogits(args, row);
    return;
  }
  Coefs coefs = args.coefs ? given_coefs(args, row) : Coefs{};
  const bool is_silent = args.coefs && all_zero(coefs);
  if (plan.writes_stats || !is_silent) {
    const RowInput in = describe(args, row, run_end);
    const int level = args.coefs && coefs.b != 0.0f && plan.level < 1 ? 1 : plan.level;
    RowSums sums;
    plan.kernels.sums(in, args.labels[row], level, &sums);
    const RowStats stats = finish_stats(sums, args.vocab, plan.sum_u);
    write_stats(args, row, stats);
    if (!args.coefs) coefs = evaluate(args, row, stats);
    if (args.dlogits && !all_zero(coefs)) write_gradient(plan, row, in, coefs, sums, stats);
  }
  write_coefs(args, row, coefs);
  if (all_zero(coefs)) zero_dlogits(args, row);
}

}  // namespace

void row_pass(const RowArgs& args) {
  const Plan plan = make_plan(args);
  const bool small = args.rows * args.vocab < (1 << 15);
  const int threads = small ? 1 : args.threads;
  const int64_t most = args.rows / (8 * (threads > 0 ? threads : 1));
  const int64_t run = most < 1 ? 1 : most > 16 ? 16 : most;
  parallel_for(threads, (args.rows + run - 1) / run, [&](int64_t k) {
    const int64_t end = (k + 1) * run < args.rows ? (k + 1) * run : args.rows;
    for (int64_t row = k * run; row < end; ++row) run_row(plan, row, end);
  });
}

}  // namespace pyoffline
