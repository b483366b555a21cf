// The vector half of each divergence, on Vec: what a sweep adds up, and dz.
//
// S and T are the student's and the teacher's row. Included by distill_sweeps.h, after one vec_*.h.
// `sums` adds to (first, second) of DivergenceSums; `dz` is the gradient in z_v before
// DivergenceGradient::factor. A product with a probability of 0 is 0 by selection, so that a masked
// entry (log-prob -inf, on either side) makes no NaN. Not here: the sweeps, the scalar half
// (../distill.h).
#pragma once

#include <float.h>

#include "../distill.h"
#include "sweeps.h"

namespace pyoffline {
namespace {

// One vector of both rows.
struct PairVec {
  F log_s, log_t;  // log S, log T
  F s, t;          // S, T; below 2^-100 they count as 0
  F gap;           // log T - log S; NaN where both are 0
};

// log x of a positive, normal x (Cephes logf): a power of two and an odd-even polynomial on
// [sqrt 1/2, sqrt 2].
inline F vec_log(F x) {
  using V = Vec;
  F n, m = V::split(x, &n);
  const F root = V::set(1.41421356f);
  n = V::less(root, m, V::add(n, V::set(1.0f)), n);
  m = V::less(root, m, V::mul(m, V::set(0.5f)), m);
  const F r = V::sub(m, V::set(1.0f)), square = V::mul(r, r);
  F p = V::set(7.0376836292e-2f);
  p = V::fma(p, r, V::set(-1.1514610310e-1f));
  p = V::fma(p, r, V::set(1.1676998740e-1f));
  p = V::fma(p, r, V::set(-1.2420140846e-1f));
  p = V::fma(p, r, V::set(1.4249322787e-1f));
  p = V::fma(p, r, V::set(-1.6668057665e-1f));
  p = V::fma(p, r, V::set(2.0000714765e-1f));
  p = V::fma(p, r, V::set(-2.4999993993e-1f));
  p = V::fma(p, r, V::set(3.3333331174e-1f));
  F y = V::mul(V::mul(p, r), square);
  y = V::fma(n, V::set(-2.12194440e-4f), y);
  y = V::fma(square, V::set(-0.5f), y);
  return V::fma(n, V::set(0.693359375f), V::add(r, y));
}

// exp(x) from 2^-126 to inf; 0 below, NaN for NaN.
inline F exp_any(F x) { return exp_above(Vec::min(Vec::set(89.0f), x), Vec::set(kFarBelow)); }

struct ForwardKL {
  static constexpr bool kNeedsPeak = false;
  explicit ForwardKL(const DivergenceTerm&) {}
  // sum T (log T - log S)
  void sums(const PairVec& x, float, F* first, F*) const {
    *first = Vec::add(*first, Vec::drop_zero(x.t, Vec::mul(x.t, x.gap)));
  }
  F dz(const PairVec& x, const DivergenceGradient&) const { return Vec::sub(x.s, x.t); }
};

struct ReverseKL {
  static constexpr bool kNeedsPeak = false;
  explicit ReverseKL(const DivergenceTerm&) {}
  // sum S (log S - log T)
  void sums(const PairVec& x, float, F* first, F*) const {
    *first = Vec::sub(*first, Vec::drop_zero(x.s, Vec::mul(x.s, x.gap)));
  }
  F dz(const PairVec& x, const DivergenceGradient& g) const {
    const F centred = Vec::sub(Vec::set(0.0f), Vec::add(x.gap, Vec::set(g.mean)));
    return Vec::drop_zero(x.s, Vec::mul(x.s, centred));
  }
};

// M = (1 - beta) S + beta T, its log formed relative to the larger of S and T: the other one's
// distance carries the rounding of the gap, but is multiplied by the smaller probability.
struct JSD {
  static constexpr bool kNeedsPeak = false;
  F beta, rest;
  explicit JSD(const DivergenceTerm& term)
      : beta(Vec::set(static_cast<float>(term.param))),
        rest(Vec::set(static_cast<float>(1.0 - term.param))) {}
  // log(M/S), log(M/T)
  void log_ratios(F gap, F* to_s, F* to_t) const {
    const F zero = Vec::set(0.0f), ratio = exp_any(Vec::sub(zero, Vec::abs(gap)));
    const F larger = Vec::less(zero, gap, beta, rest), smaller = Vec::less(zero, gap, rest, beta);
    const F log_m = vec_log(Vec::fma(smaller, ratio, larger));
    *to_s = Vec::less(zero, gap, Vec::add(gap, log_m), log_m);
    *to_t = Vec::less(zero, gap, log_m, Vec::sub(log_m, gap));
  }
  // sum S log(S/M), sum T log(T/M)
  void sums(const PairVec& x, float, F* first, F* second) const {
    F to_s, to_t;
    log_ratios(x.gap, &to_s, &to_t);
    *first = Vec::sub(*first, Vec::drop_zero(x.s, Vec::mul(x.s, to_s)));
    *second = Vec::sub(*second, Vec::drop_zero(x.t, Vec::mul(x.t, to_t)));
  }
  F dz(const PairVec& x, const DivergenceGradient& g) const {
    F to_s, to_t;
    log_ratios(x.gap, &to_s, &to_t);
    const F centred = Vec::sub(Vec::set(0.0f), Vec::add(to_s, Vec::set(g.mean)));
    return Vec::drop_zero(x.s, Vec::mul(x.s, centred));
  }
};

struct TVD {
  static constexpr bool kNeedsPeak = false;
  explicit TVD(const DivergenceTerm&) {}
  static F half_sign(const PairVec& x) {
    const F half = Vec::set(0.5f), zero = Vec::set(0.0f);
    return Vec::less(x.t, x.s, half, Vec::less(x.s, x.t, Vec::sub(zero, half), zero));
  }
  // 1/2 sum |S - T|, 1/2 sum S sign(S - T)
  void sums(const PairVec& x, float, F* first, F* second) const {
    *first = Vec::fma(Vec::set(0.5f), Vec::abs(Vec::sub(x.s, x.t)), *first);
    *second = Vec::fma(x.s, half_sign(x), *second);
  }
  F dz(const PairVec& x, const DivergenceGradient& g) const {
    return Vec::mul(x.s, Vec::sub(half_sign(x), Vec::set(g.mean)));
  }
};

// T^alpha S^(1 - alpha) and its distance from the base, S or T.
struct Power {
  bool by_teacher;
  F c;
  explicit Power(double alpha)
      : by_teacher(base_is_teacher(alpha)),
        c(Vec::set(static_cast<float>(by_teacher ? alpha - 1.0 : alpha))) {}
  F log_base(const PairVec& x) const { return by_teacher ? x.log_t : x.log_s; }
  // x where the base is not 0, else `other`
  static F where_base(F log_base, F x, F other) {
    return Vec::less(log_base, Vec::set(-FLT_MAX), other, x);
  }
  F exponent(const PairVec& x) const { return Vec::fma(c, x.gap, log_base(x)); }
  F value(const PairVec& x) const {
    return where_base(log_base(x), exp_any(exponent(x)), Vec::set(0.0f));
  }
  // base expm1(u), by the polynomial of exp_clamped where |u| is small
  F beyond_base(const PairVec& x) const {
    using V = Vec;
    const F u = V::mul(c, x.gap), base = by_teacher ? x.t : x.s;
    F p = V::set(0x1.6a2256p-10f);
    p = V::fma(p, u, V::set(0x1.123b02p-7f));
    p = V::fma(p, u, V::set(0x1.5558f8p-5f));
    p = V::fma(p, u, V::set(0x1.555490p-3f));
    p = V::fma(p, u, V::set(0x1.fffffcp-2f));
    const F near = V::mul(base, V::fma(V::mul(p, u), u, u));
    const F far = V::sub(exp_any(V::add(log_base(x), u)), base);
    return where_base(log_base(x), V::less(V::abs(u), V::set(0.34f), near, far), V::set(0.0f));
  }
};

struct RenyiDivergence {
  static constexpr bool kNeedsPeak = true;
  Power power;
  explicit RenyiDivergence(const DivergenceTerm& term) : power(term.param) {}
  F exponent(const PairVec& x) const {
    return Power::where_base(power.log_base(x), power.exponent(x), Vec::set(-INFINITY));
  }
  // sum exp(w - max w), w = log(T^alpha S^(1 - alpha)); sum T^alpha S^(1 - alpha) - 1
  void sums(const PairVec& x, float peak, F* first, F* second) const {
    *first = Vec::add(*first, exp_any(Vec::sub(exponent(x), Vec::set(peak))));
    *second = Vec::add(*second, power.beyond_base(x));
  }
  F dz(const PairVec& x, const DivergenceGradient& g) const {
    const F q = exp_any(Vec::sub(exponent(x), Vec::set(g.peak)));
    return Vec::sub(x.s, Vec::mul(q, Vec::set(g.mean)));
  }
};

struct AlphaDivergence {
  static constexpr bool kNeedsPeak = false;
  Power power;
  explicit AlphaDivergence(const DivergenceTerm& term) : power(term.param) {}
  // B = sum T^alpha S^(1 - alpha) - 1
  void sums(const PairVec& x, float, F* first, F*) const {
    *first = Vec::add(*first, power.beyond_base(x));
  }
  // S (1 + B) - T^alpha S^(1 - alpha)
  F dz(const PairVec& x, const DivergenceGradient& g) const {
    const F product = Vec::drop_zero(x.s, Vec::mul(x.s, Vec::set(g.mean)));
    const F base = power.by_teacher ? Vec::sub(x.s, x.t) : Vec::set(0.0f);
    return Vec::add(base, Vec::sub(product, power.beyond_base(x)));
  }
};

// Calls fn with the divergence of this term.
template <class Fn>
inline void with_divergence(const DivergenceTerm& term, const Fn& fn) {
  switch (term.code) {
    case forward_kl_code:
      return fn(ForwardKL(term));
    case reverse_kl_code:
      return fn(ReverseKL(term));
    case jsd_code:
      return fn(JSD(term));
    case tvd_code:
      return fn(TVD(term));
    case renyi_divergence_code:
      return fn(RenyiDivergence(term));
    default:
      return fn(AlphaDivergence(term));
  }
}

}  // namespace
}  // namespace pyoffline
