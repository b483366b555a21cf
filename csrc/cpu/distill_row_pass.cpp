// The distillation driver: for each row, sums of the student's and of the teacher's row ->
// statistics and objective -> sums of the divergences -> dlogits, all by one thread.
//
// A top-k teacher makes k + 1 buckets of both rows: the k entries, and one for all others. Their
// log-probs go through the same sweeps as two short rows; the gradient of the last bucket reaches
// every other entry through p. The student's sum over those entries is formed apart, never as a
// difference from 1. Compiled for the baseline CPU; the rest is as in row_pass.cpp. Not here:
// argument checks.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../distill_args.h"
#include "dispatch.h"
#include "dispatch_internal.h"
#include "distill_kernels.h"
#include "parallel.h"
#include "row_memory.h"

namespace pyoffline {

namespace {

// exp of less than this is nothing beside 1 in fp32, and far from where it flushes to 0.
constexpr double kFarTail = -40.0;

const DistillKernels& distill_kernels(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == avx512_distill_kernels.name) return avx512_distill_kernels;
  if (isa == avx2_distill_kernels.name) return avx2_distill_kernels;
#endif
  return portable_distill_kernels;
}

// What is the same for every row of a call.
struct Call {
  const DistillArgs& args;
  const Kernels& kernels;
  const DistillKernels& pair_kernels;
  int level;  // of the student's RowSums
};

// One thread's buffers for the buckets of a top-k teacher.
struct Buckets {
  std::vector<float> t, damp, log_s, log_t, dz;
  ApartSum apart;    // the last bucket, relative to its own maximum
  double log_apart;  // log of its sum of exp(z - m), m of the whole row

  explicit Buckets(int64_t k)
      : t(k), damp(k), log_s(k + 1), log_t(k + 1), dz(k + 1), apart{0.0f, 0.0}, log_apart(0.0) {}
};

// The student's half of one row.
struct Student {
  RowInput in;
  RowSums sums;
  RowStats stats;
  Coefs coefs;
};

struct Teacher {
  RowPair pair;
  float entropy;
  bool agrees;  // its largest logit is the student's
};

RowInput short_row(const std::vector<float>& log_p, int64_t count) {
  return {log_p.data(), DType::f32, count, nullptr, nullptr, 1.0f, 1.0f, 0.0f, nullptr};
}

Student read_student(const Call& call, int64_t row, int64_t run_end) {
  const RowArgs& args = call.args.row;
  Student out;
  out.in = describe_stored(args, row, run_end);
  out.coefs = args.coefs ? given_coefs(args, row) : Coefs{};
  const int level = out.coefs.b != 0.0f && call.level < 1 ? 1 : call.level;
  call.kernels.sums(out.in, args.labels[row], level, &out.sums);
  out.stats = finish_stats(out.sums, args.vocab, static_cast<double>(args.vocab));
  if (!args.coefs) out.coefs = evaluate(args, row, out.stats);
  return out;
}

Teacher whole_row(const Call& call, int64_t row, int64_t run_end, const Student& student) {
  const RowArgs& args = call.args.teacher;
  const RowInput in = describe_stored(args, row, run_end);
  RowSums sums;
  call.kernels.sums(in, 0, 1, &sums);
  const RowStats stats = finish_stats(sums, args.vocab, static_cast<double>(args.vocab));
  const int64_t top = call.pair_kernels.argmax(in, sums.y_max);
  float t = -1.0f, damp;
  if (top >= 0) call.pair_kernels.gather(student.in, student.sums.offset, &top, 1, &t, &damp);
  const RowPair pair = {student.in,      in,      student.sums.offset, sums.offset,
                        student.stats.d, stats.d, student.stats.log_d, stats.log_d};
  return {pair, stats.entropy, t >= 0.0f};
}

Teacher top_k(const Call& call, int64_t row, const Student& student, Buckets& buckets) {
  const DistillArgs& args = call.args;
  const int64_t k = args.k, *ids = args.topk_ids + row * k;
  const float* logps = args.topk_logps + row * k;
  const double tail = args.topk_tail[row];
  call.pair_kernels.gather(student.in, student.sums.offset, ids, k, buckets.t.data(),
                           buckets.damp.data());
  double entropy = tail > 0.0 ? -tail * std::log(tail) : 0.0 * tail;
  int64_t top = 0;
  for (int64_t j = 0; j < k; ++j) {
    buckets.log_s[j] = static_cast<float>(buckets.t[j] - student.stats.log_d);
    buckets.log_t[j] = logps[j];
    const double p = std::exp(static_cast<double>(logps[j]));
    entropy -= zero_safe(p, logps[j]);
    if (logps[j] > logps[top]) top = j;
  }
  const double slope = student.in.slope;
  buckets.apart = call.pair_kernels.sum_apart(student.in, ids, k);
  buckets.log_apart = slope * (buckets.apart.offset - static_cast<double>(student.sums.offset)) +
                      std::log(buckets.apart.sum);
  buckets.log_s[k] = static_cast<float>(buckets.log_apart - student.stats.log_d);
  buckets.log_t[k] = static_cast<float>(std::log(tail));
  const int64_t count = k < args.row.vocab ? k + 1 : k;
  const RowPair pair = {short_row(buckets.log_s, count),
                        short_row(buckets.log_t, count),
                        0.0f,
                        0.0f,
                        1.0,
                        1.0,
                        0.0,
                        0.0};
  return {pair, static_cast<float>(entropy), buckets.t[top] >= 0.0f};
}

double chain_factor(const RowArgs& args, int64_t row) {
  const double weight = args.weights ? args.weights[row] : 1.0;
  return weight * args.grad_scale * args.logit_scale / temperature_of(args, row);
}

// The gradient of the last bucket, added to the objective's: each entry's share of it is
// exp(z - m) / exp(log_apart). Where all of them lie so far below the maximum that exp(z - m) would
// flush to 0, the sweep runs from their own maximum; the objective's p is nothing there.
RowGradient with_last_bucket(const Student& student, const RowGradient& objective,
                             const Buckets& buckets, double dz, RowSums* sums) {
  RowGradient out = objective;
  if (dz == 0.0 || buckets.apart.sum == 0.0) return out;
  if (buckets.log_apart < kFarTail) {
    out.from_p = static_cast<float>(dz / buckets.apart.sum);
    out.from_pt = 0.0f;
    sums->offset = buckets.apart.offset;
  } else {
    out.from_p += static_cast<float>(dz * std::exp(-buckets.log_apart));
  }
  const double share = std::exp(student.sums.t_label - buckets.log_apart);
  out.at_label += static_cast<float>(zero_safe(student.sums.damp_label * share, dz));
  out.is_nan = out.is_nan || out.from_p != out.from_p;
  return out;
}

// dlogits of a top-k row: the last bucket rides on p of the objective, then the k entries are
// written one by one.
void write_top_k(const Call& call, int64_t row, const Student& student, const Teacher& teacher,
                 const RowGradient& plain, const DivergenceGradient* terms, int32_t n,
                 Buckets& buckets) {
  const RowArgs& args = call.args.row;
  const int64_t k = call.args.k, *ids = call.args.topk_ids + row * k, label = args.labels[row];
  call.pair_kernels.gradient(teacher.pair, nullptr, 0, terms, n, DType::f32, buckets.dz.data());
  RowSums sums = student.sums;
  const double last = k < args.vocab ? buckets.dz[k] : 0.0;
  const RowGradient objective = with_last_bucket(student, plain, buckets, last, &sums);
  if (objective.is_nan) return nan_dlogits(args, row);
  char* out = dlogits_row(args, row);
  call.kernels.gradient(student.in, sums, objective, label, args.dlogits_type, out);
  for (int64_t j = 0; j < k; ++j) {
    const double t = buckets.t[j], e = std::exp(t);
    double dz = e == 0.0 ? 0.0 : e * (plain.from_p - zero_safe(plain.from_pt, t));
    dz = ids[j] == label ? 0.0 : zero_safe(dz - plain.from_u, buckets.damp[j]);
    dz += zero_safe(buckets.dz[j], buckets.damp[j]);
    const float value = static_cast<float>(ids[j] == label ? dz + plain.at_label : dz);
    if (args.dlogits_type == DType::f32) {
      from_float(value, reinterpret_cast<float*>(out) + ids[j]);
    } else if (args.dlogits_type == DType::bf16) {
      from_float(value, reinterpret_cast<bf16*>(out) + ids[j]);
    } else {
      from_float(value, reinterpret_cast<f16*>(out) + ids[j]);
    }
  }
}

void write_gradient(const Call& call, int64_t row, const Student& student, const Teacher& teacher,
                    const DivergenceGradient* terms, int32_t n, Buckets& buckets) {
  const RowArgs& args = call.args.row;
  const bool silent = all_zero(student.coefs);
  if (silent && n == 0) return zero_dlogits(args, row);
  RowGradient objective = {0.0f, 0.0f, 0.0f, 0.0f, false};
  if (!silent) {
    objective = gradient_constants(student.coefs, student.sums, student.stats,
                                   chain_factor(args, row), args.vocab, 1.0, 1.0);
  }
  bool is_nan = objective.is_nan;
  for (int32_t k = 0; k < n; ++k) is_nan = is_nan || terms[k].is_nan;
  if (is_nan) return nan_dlogits(args, row);
  if (call.args.k > 0) {
    write_top_k(call, row, student, teacher, objective, terms, n, buckets);
  } else {
    call.pair_kernels.gradient(teacher.pair, silent ? nullptr : &objective, args.labels[row], terms,
                               n, args.dlogits_type, dlogits_row(args, row));
  }
}

void write_nothing(const DistillArgs& args, int64_t row) {
  write_stats(args.row, row, RowStats{});
  write_coefs(args.row, row, Coefs{});
  zero_dlogits(args.row, row);
  for (int32_t k = 0; k < args.n_divergences; ++k) args.values[k * args.row.rows + row] = 0.0f;
  args.teacher_entropy[row] = 0.0f;
  args.top1_agreement[row] = 0;
}

void run_row(const Call& call, int64_t row, int64_t run_end, Buckets& buckets) {
  const DistillArgs& args = call.args;
  if (!is_counted(args.row, row)) return write_nothing(args, row);
  const Student student = read_student(call, row, run_end);
  const Teacher teacher =
      args.k > 0 ? top_k(call, row, student, buckets) : whole_row(call, row, run_end, student);
  DivergenceSums sums[kMaxDivergences];
  DivergenceGradient terms[kMaxDivergences];
  call.pair_kernels.sums(teacher.pair, args.divergences, args.n_divergences, sums);
  double loss = student.coefs.loss;
  int32_t live = 0;
  for (int32_t k = 0; k < args.n_divergences; ++k) {
    const DivergenceTerm& term = args.divergences[k];
    const double value = divergence_value(term, sums[k]);
    args.values[k * args.row.rows + row] = static_cast<float>(value);
    const double factor = term.scale * (term.gate < 0 ? 1.0 : args.row.extras[term.gate][row]);
    if (factor == 0.0) continue;
    loss += factor * value;
    terms[live++] = divergence_gradient(term, sums[k], factor * chain_factor(args.row, row));
  }
  write_stats(args.row, row, student.stats);
  Coefs coefs = student.coefs;
  coefs.loss = static_cast<float>(loss);
  write_coefs(args.row, row, coefs);
  args.teacher_entropy[row] = teacher.entropy;
  args.top1_agreement[row] = teacher.agrees;
  if (args.row.dlogits) write_gradient(call, row, student, teacher, terms, live, buckets);
}

}  // namespace

void distill_row_pass(const DistillArgs& args) {
  const Kernels& kernels = active_kernels();
  const int level = std::max(1, make_plan(args.row).level);
  const Call call = {args, kernels, distill_kernels(kernels.name), level};
  const int64_t rows = args.row.rows;
  const bool small = rows * args.row.vocab < (1 << 15);
  const int threads = small ? 1 : args.row.threads;
  const int64_t most = rows / (8 * (threads > 0 ? threads : 1));
  const int64_t run = most < 1 ? 1 : most > 16 ? 16 : most;
  parallel_for(threads, (rows + run - 1) / run, [&](int64_t i) {
    Buckets buckets(args.k);
    const int64_t end = (i + 1) * run < rows ? (i + 1) * run : rows;
    for (int64_t row = i * run; row < end; ++row) run_row(call, row, end, buckets);
  });
}

}  // namespace pyoffline
