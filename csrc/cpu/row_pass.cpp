// The row driver: for each row, sums -> statistics -> objective -> gradient constants -> dlogits,
// all by one thread.
//
// A row's result depends on that row alone, so it is the same for every thread count and position.
// Rows are handed out in runs, because a row's sweeps pull the next one of the run into L2. An
// ignored row, or one of weight 0, is never read. Compiled for the baseline CPU; the sweeps come
// from the table of the chosen instruction set. Not here: argument checks.
#include "dispatch.h"
#include "parallel.h"
#include "row_driver.h"
#include "row_memory.h"

namespace pyoffline {

namespace {

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
    const RowInput in = describe_stored(args, row, run_end);
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
