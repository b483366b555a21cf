// Divergences between a student's row S and a teacher's row T: their numbers, and the scalar half
// (from a row's sums to the value and to what the gradient sweep multiplies with).
//
// With x_v = log S_v - log T_v and D a function of S, the gradient in the student's logits is
//   dz_v = S_v (g_v - sum_u S_u g_u),  g = dD/dS
// The vector half, one struct a divergence, is cpu/divergences.h; the same table in Python is
// pyoffline/divergence_math.py. Not here: softmax, loops, weights.
#pragma once

#include <math.h>

#include <cstdint>

#include "objectives.h"
#include "row_args.h"

namespace pyoffline {

enum DivergenceCode : int32_t {
  forward_kl_code = 1,
  reverse_kl_code = 2,
  jsd_code = 3,
  tvd_code = 4,
  renyi_divergence_code = 5,
  alpha_divergence_code = 6,
};

// Terms of one call; more are refused.
constexpr int32_t kMaxDivergences = 8;

struct DivergenceTerm {
  int32_t code;
  int32_t gate;  // index into RowArgs::extras, or -1
  float scale;
  double param;  // beta of JSD, alpha
};

// What one sweep over both rows adds up; which sums they are is said beside each vector function.
struct DivergenceSums {
  double first, second;
  float peak;  // RenyiDivergence: max log(T^alpha S^(1 - alpha))
};

// The power family, RenyiDivergence and AlphaDivergence:
//   T^a S^(1-a) - base = base expm1(c (log T - log S))
// keeps its digits where a is near 0 or 1. base is T (c = a - 1) or S (c = a), whichever is nearer.
PYOFFLINE_HD inline bool base_is_teacher(double alpha) { return alpha >= 0.5; }

PYOFFLINE_HD inline double renyi_value(double alpha, const DivergenceSums& sums) {
  const double inf = INFINITY, peak = sums.peak;
  if (sums.second != sums.second) return sums.second;
  if (fabs(sums.second) < 0.5) return log1p(sums.second) / (alpha - 1.0);
  if (peak == inf || peak == -inf) return inf;  // no overlap, or T > 0 where S = 0
  return (peak + log(sums.first)) / (alpha - 1.0);
}

PYOFFLINE_HD inline double divergence_value(const DivergenceTerm& term,
                                            const DivergenceSums& sums) {
  const double a = term.param;
  switch (term.code) {
    case jsd_code:
      return a * sums.second + (1.0 - a) * sums.first;
    case renyi_divergence_code:
      return renyi_value(a, sums);
    case alpha_divergence_code:
      return sums.first / (a * (a - 1.0));
    default:
      return sums.first;
  }
}

// factor: of the weight, the term's scale and gate, and the chain rule of scale and temperature.
struct DivergenceGradient {
  int32_t code;
  double param;
  float factor;
  float mean;  // sum_u S_u g_u up to the constant that the divergence takes out
  float peak;
  bool is_nan;  // no entry has a value: write NaN over the whole row
};

PYOFFLINE_HD inline DivergenceGradient divergence_gradient(const DivergenceTerm& term,
                                                           const DivergenceSums& sums,
                                                           double factor) {
  DivergenceGradient out = {term.code, term.param, 0.0f, static_cast<float>(sums.first),
                            sums.peak, false};
  if (term.code == jsd_code) {
    factor *= 1.0 - term.param;
  } else if (term.code == tvd_code) {
    out.mean = static_cast<float>(sums.second);
  } else if (term.code == renyi_divergence_code) {
    out.mean = static_cast<float>(1.0 / sums.first);
  } else if (term.code == alpha_divergence_code) {
    factor /= term.param;
  }
  out.factor = static_cast<float>(factor);
  const double value = divergence_value(term, sums);
  out.is_nan = value != value || out.mean != out.mean || out.factor != out.factor;
  return out;
}

}  // namespace pyoffline
