// exp and tanh on Vec, the elementary functions of the row pass. Included after one vec_*.h.
//
// exp: n = round(x log2 e), r = x - n ln 2 in two parts, a degree-6 polynomial (relative error
// 3e-9) and one scaling by 2^n, which rounds a denormal result correctly. exp(0) == 1, exp(x) == 0
// for x <= -104, inf above 88.73, NaN stays NaN.
// tanh: an odd polynomial below 0.625 (Cephes), above it 1 - 2 q / (1 + q) with q = exp(-2|x|).
// Not here: log, which the row pass needs once a row, in fp64.
#pragma once

namespace pyoffline {
namespace {

// Below this exp is exactly 0: exp(-104) is less than half the smallest denormal.
constexpr float kExpZero = -104.0f;

// x clamped to where exp is finite arithmetic; a NaN passes (Vec::max and Vec::min return their
// second argument).
inline Vec::F clamp_for_exp(Vec::F x) {
  return Vec::min(Vec::set(89.0f), Vec::max(Vec::set(kExpZero), x));
}

inline Vec::F exp_clamped(Vec::F x) {
  using V = Vec;
  const V::F magic = V::set(0x1.8p23f);  // adding it rounds to a whole number in the low bits
  const V::F n = V::sub(V::fma(x, V::set(0x1.715476p+0f), magic), magic);
  V::F r = V::fma(n, V::set(-0x1.62e4p-1f), x);  // n * this head of ln 2 is exact
  r = V::fma(n, V::set(-0x1.7f7d1cp-20f), r);
  V::F p = V::set(0x1.6a2256p-10f);
  p = V::fma(p, r, V::set(0x1.123b02p-7f));
  p = V::fma(p, r, V::set(0x1.5558f8p-5f));
  p = V::fma(p, r, V::set(0x1.555490p-3f));
  p = V::fma(p, r, V::set(0x1.fffffcp-2f));
  p = V::fma(p, r, V::set(1.0f));
  p = V::fma(p, r, V::set(1.0f));
  return V::scale_by_power(p, n);
}

inline Vec::F vec_exp(Vec::F x) { return exp_clamped(clamp_for_exp(x)); }

inline Vec::F vec_tanh(Vec::F x) {
  using V = Vec;
  const V::F size = V::abs(x), one = V::set(1.0f);
  const V::F q = vec_exp(V::mul(V::set(-2.0f), size));
  const V::F large = V::sub(one, V::div(V::add(q, q), V::add(one, q)));
  const V::F square = V::mul(size, size);
  V::F p = V::set(-5.70498872745e-3f);
  p = V::fma(p, square, V::set(2.06390887954e-2f));
  p = V::fma(p, square, V::set(-5.37397155531e-2f));
  p = V::fma(p, square, V::set(1.33314422036e-1f));
  p = V::fma(p, square, V::set(-3.33332819422e-1f));
  const V::F small = V::fma(V::mul(p, square), size, size);
  return V::copysign(V::less(size, V::set(0.625f), small, large), x);
}

}  // namespace
}  // namespace pyoffline
