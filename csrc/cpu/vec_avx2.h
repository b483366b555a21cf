// Eight fp32 lanes of AVX2 with FMA and F16C. The interface is the one of vec_portable.h, which
// explains it.
#pragma once

#include <immintrin.h>

#include "half_bits.h"

namespace pyoffline {
namespace {

struct Vec {
  using F = __m256;
  struct Sum {
    __m256d low, high;
  };
  static constexpr int width = 8;

  static F set(float x) { return _mm256_set1_ps(x); }
  static float first(F x) { return _mm256_cvtss_f32(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F x) { return _mm256_andnot_ps(set(-0.0f), x); }
  static F copysign(F x, F sign) {
    const F bit = set(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, x), _mm256_and_ps(bit, sign));
  }
  static bool any_greater(F a, F b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  static F less(F a, F b, F yes, F no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  static F drop_zero(F key, F x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(key, set(0.0f), _CMP_NEQ_UQ));
  }
  static F keep_above(F key, F low, F x) {
    return _mm256_and_ps(x, _mm256_cmp_ps(key, low, _CMP_NLE_UQ));
  }
  static int count_zero(F x) {
    return __builtin_popcount(_mm256_movemask_ps(_mm256_cmp_ps(x, set(0.0f), _CMP_EQ_OQ)));
  }
  static F keep(F x, int n, float fill) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i in = _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane);
    return _mm256_blendv_ps(set(fill), x, _mm256_castsi256_ps(in));
  }
  // Two steps, each a normal power of two, so that the one rounding of a denormal result is the
  // last operation.
  static F scale_by_power(F x, F n) {
    const __m256i whole = _mm256_cvtps_epi32(n);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return mul(mul(x, power(half)), power(_mm256_sub_epi32(whole, half)));
  }
  static F split(F x, F* exponent) {
    const __m256i u = _mm256_castps_si256(x);
    *exponent =
        _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(u, 23), _mm256_set1_epi32(127)));
    const __m256i fraction = _mm256_and_si256(u, _mm256_set1_epi32(0x007fffff));
    return _mm256_castsi256_ps(_mm256_or_si256(fraction, _mm256_set1_epi32(0x3f800000)));
  }
  static float max_lane(F x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_shuffle_ps(y, y, 1)));
  }

  static Sum zero_sum() { return {_mm256_setzero_pd(), _mm256_setzero_pd()}; }
  static void accumulate(Sum& sum, F x) {
    sum.low = _mm256_add_pd(sum.low, _mm256_cvtps_pd(_mm256_castps256_ps128(x)));
    sum.high = _mm256_add_pd(sum.high, _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)));
  }
  static double total(const Sum& sum) {
    const __m256d s = _mm256_add_pd(sum.low, sum.high);
    const __m128d t = _mm_add_pd(_mm256_castpd256_pd128(s), _mm256_extractf128_pd(s, 1));
    return _mm_cvtsd_f64(t) + _mm_cvtsd_f64(_mm_unpackhi_pd(t, t));
  }

  static F load(const float* x) { return _mm256_loadu_ps(x); }
  static F load(const bf16* x) {
    const __m256i wide =
        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F load(const f16* x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  template <class T>
  static F load(const T* x, int n) {
    T lanes[width] = {};
    memcpy(lanes, x, n * sizeof(T));
    return load(lanes);
  }
  static void store(float* out, F x) { _mm256_storeu_ps(out, x); }
  static void store(bf16* out, F x) {
    const __m256i u = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
    const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    const __m256 picked =
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
    const __m256i top = _mm256_srli_epi32(_mm256_castps_si256(picked), 16);
    const __m256i packed = _mm256_packus_epi32(top, top);
    const __m256i joined = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(joined));
  }
  static void store(f16* out, F x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out),
                     _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
  template <class T>
  static void store_number(T* out, F x) {
    store(out, x);
  }
  template <class T>
  static void store(T* out, F x, int n) {
    T lanes[width];
    store(lanes, x);
    memcpy(out, lanes, n * sizeof(T));
  }

 private:
  static F power(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
}  // namespace pyoffline
