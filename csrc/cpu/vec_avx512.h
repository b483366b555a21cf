// Sixteen fp32 lanes of AVX-512 F/BW/VL/DQ. The interface is the one of vec_portable.h, which
// explains it.
#pragma once

#include <immintrin.h>

#include "half_bits.h"

// GCC 12 reports its own _mm512_undefined_ps() at every inlined use (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

namespace pyoffline {
namespace {

struct Vec {
  using F = __m512;
  struct Sum {
    __m512d low, high;
  };
  static constexpr int width = 16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static float first(F x) { return _mm512_cvtss_f32(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F x) { return _mm512_andnot_ps(set(-0.0f), x); }
  static F copysign(F x, F sign) {
    const F bit = set(-0.0f);
    return _mm512_or_ps(_mm512_andnot_ps(bit, x), _mm512_and_ps(bit, sign));
  }
  static bool any_greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0; }
  static F less(F a, F b, F yes, F no) {
    return _mm512_mask_mov_ps(no, _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), yes);
  }
  static F drop_zero(F key, F x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(key, set(0.0f), _CMP_NEQ_UQ), x);
  }
  static F keep_above(F key, F low, F x) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(key, low, _CMP_NLE_UQ), x);
  }
  static int count_zero(F x) {
    return __builtin_popcount(_mm512_cmp_ps_mask(x, set(0.0f), _CMP_EQ_OQ));
  }
  static F keep(F x, int n, float fill) { return _mm512_mask_mov_ps(set(fill), mask(n), x); }
  static F scale_by_power(F x, F n) { return _mm512_scalef_ps(x, n); }
  static F split(F x, F* exponent) {
    *exponent = _mm512_getexp_ps(x);
    return _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  }
  static float max_lane(F x) { return _mm512_reduce_max_ps(x); }

  static Sum zero_sum() { return {_mm512_setzero_pd(), _mm512_setzero_pd()}; }
  static void accumulate(Sum& sum, F x) {
    sum.low = _mm512_add_pd(sum.low, _mm512_cvtps_pd(_mm512_castps512_ps256(x)));
    sum.high = _mm512_add_pd(sum.high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)));
  }
  static double total(const Sum& sum) {
    return _mm512_reduce_add_pd(_mm512_add_pd(sum.low, sum.high));
  }

  static F load(const float* x) { return _mm512_loadu_ps(x); }
  static F load(const bf16* x) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static F load(const f16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  static F load(const float* x, int n) { return _mm512_maskz_loadu_ps(mask(n), x); }
  static F load(const bf16* x, int n) { return widen(_mm256_maskz_loadu_epi16(mask(n), x)); }
  static F load(const f16* x, int n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask(n), x));
  }
  static void store(float* out, F x) { _mm512_storeu_ps(out, x); }
  static void store(bf16* out, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow(x));
  }
  static void store(f16* out, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), to_half(x));
  }
  static void store(float* out, F x, int n) { _mm512_mask_storeu_ps(out, mask(n), x); }
  static void store(bf16* out, F x, int n) { _mm256_mask_storeu_epi16(out, mask(n), narrow(x)); }
  static void store(f16* out, F x, int n) { _mm256_mask_storeu_epi16(out, mask(n), to_half(x)); }

  template <class T>
  static void store_number(T* out, F x) {
    store(out, x);
  }
  static void store_number(bf16* out, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), narrow_number(x));
  }

 private:
  static __mmask16 mask(int n) { return static_cast<__mmask16>((1u << n) - 1); }
  static F widen(__m256i x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static __m512i round_to_bf16(__m512i u) {
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  }
  static __m256i narrow_number(F x) {
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(_mm512_castps_si512(x)), 16));
  }
  static __m256i narrow(F x) {
    const __m512i u = _mm512_castps_si512(x);
    const __m512i picked = _mm512_mask_or_epi32(
        round_to_bf16(u), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x00400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(picked, 16));
  }
  static __m256i to_half(F x) {
    return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};

}  // namespace
}  // namespace pyoffline
