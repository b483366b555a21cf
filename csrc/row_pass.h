// The scalar half of the row pass: from a row's sums to its statistics, and from coefficients to
// gradient constants.
//
// The vector half (cpu/sweeps.h) sums over the row before and writes dlogits after. In between,
// once a row and in fp64, with t = z - m and e = exp(t):
//   d       = ones + tail
//   logp    = t_y - log d
//   entropy = log d - s/d,  s = sum e t
//   lse     = m + log d
// `ones` counts the entries of the block of the maximum that equal it, `tail` is all the rest, so
// that log d = log1p(ones - 1 + tail) keeps every bit of a confident row. Not here: objectives,
// weights, loops.
#pragma once

#include <math.h>

#include "objectives.h"

namespace pyoffline {

// Sums over one row. Level 0 fills up to `tail`, 1 adds s and tail_squares, 2 adds sum_ut.
struct RowSums {
  float y_max;          // in the ordered coordinate of cpu/sweeps.h
  float offset;         // y_max, or tanh of it under a softcap
  double m;             // max z
  float t_label;        // z_y - m
  float damp_label;     // 1 - tanh^2 at the label; 1 without a softcap
  double ones, tail;    // d = ones + tail
  double s;             // sum e t
  double tail_squares;  // sum e^2 without `ones`
  double sum_ut;        // sum u t
};

struct RowStats {
  double log_d, d, mean_t;  // mean_t = s/d
  double logp_exact;        // before its rounding to fp32
  float logp, entropy, lse, gap, log_sum_p2;
  bool is_top1;
};

// sum_u: the sum of the class weights, vocab if there are none.
PYOFFLINE_HD inline RowStats finish_stats(const RowSums& sums, int64_t vocab, double sum_u) {
  RowStats out;
  out.d = sums.ones + sums.tail;
  out.log_d = log1p(sums.ones - 1.0 + sums.tail);
  out.mean_t = sums.s / out.d;
  const double logp = static_cast<double>(sums.t_label) - out.log_d;
  out.logp_exact = logp > 0.0 ? 0.0 : logp;
  out.logp = static_cast<float>(out.logp_exact);
  out.entropy = static_cast<float>(out.log_d - out.mean_t);
  out.lse = static_cast<float>(sums.m + out.log_d);
  out.gap = static_cast<float>((out.log_d * sum_u - sums.sum_ut) / static_cast<double>(vocab));
  out.log_sum_p2 = static_cast<float>(log1p(sums.ones - 1.0 + sums.tail_squares) - 2.0 * out.log_d);
  out.is_top1 = sums.t_label >= 0.0f;
  return out;
}

// What the gradient sweep multiplies with, and the label's own value:
//   dlogits_v = damp_v (e_v (from_p - from_pt t_v) - from_u u_v)
// Where e_v is 0 the first product is 0 whatever from_p is.
struct RowGradient {
  float from_p, from_pt, from_u;
  float at_label;
  bool is_nan;  // write NaN over the whole row
};

PYOFFLINE_HD inline double zero_safe(double x, double y) {
  const bool zero = (x == 0.0 || y == 0.0) && x == x && y == y;
  return zero ? 0.0 : x * y;
}

// factor = weight * grad_scale * logit_scale / T. mean_u, u_label: of the class weights, 1 if there
// are none.
PYOFFLINE_HD inline RowGradient gradient_constants(const Coefs& coefs, const RowSums& sums,
                                                   const RowStats& stats, double factor,
                                                   int64_t vocab, double mean_u, double u_label) {
  const double a = coefs.a, b = coefs.b, c = coefs.c, e = coefs.e;
  const double mean_t = b == 0.0 ? 0.0 : stats.mean_t;
  const double common = c + zero_safe(e, mean_u) + zero_safe(b, mean_t);
  RowGradient out;
  out.from_p = static_cast<float>(factor * (common - a) / stats.d);
  out.from_pt = static_cast<float>(factor * b / stats.d);
  out.from_u = static_cast<float>(factor * e / static_cast<double>(vocab));
  const double p = exp(stats.logp_exact), rest = -expm1(stats.logp_exact);
  double label = zero_safe(a, rest) + zero_safe(p, common);
  if (p != 0.0) label -= zero_safe(b, p * static_cast<double>(sums.t_label));
  label -= zero_safe(e, u_label) / static_cast<double>(vocab);
  out.at_label = static_cast<float>(zero_safe(factor * label, sums.damp_label));
  out.is_nan = out.from_p != out.from_p || out.from_pt != out.from_pt || out.from_u != out.from_u;
  return out;
}

}  // namespace pyoffline
