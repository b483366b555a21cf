// Four fp32 lanes in GCC vector extensions: SSE2 on any x86-64, NEON on aarch64. Also the
// definition of what Vec means:
//
//   max(a, b), min(a, b)     b where either is NaN
//   less(a, b, yes, no)      yes where a < b; a comparison with NaN is false
//   any_greater(a, b)        whether a > b in a lane
//   drop_zero(key, x)        0 where key == 0, else x, also where key is NaN
//   keep_above(key, low, x)  0 where key <= low, else x, also where key is NaN
//   count_zero(x)            number of lanes == 0
//   keep(x, n, fill)         the first n lanes of x, fill in the others
//   scale_by_power(x, n)     x 2^n for whole n in [-151, 129], rounded once
//   split(x, &n)             x / 2^n in [1, 2) of a positive normal x
//   first(x), max_lane(x)    one lane as a float
//   Sum                      fp32 lanes added up in fp64: zero_sum, accumulate, total
//   load(p, n), store(p, x, n)  the first n lanes; absent lanes are read as 0
//   store_number(p, x)       store of lanes without NaN
// Where there is no FMA, fma rounds twice: results differ in the last bit between instruction sets,
// never within one.
#pragma once

#include "half_bits.h"

// Sum is wider than a baseline register; it never crosses a call that another file could see.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace pyoffline {
namespace {

struct Vec {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef double Sum __attribute__((vector_size(32)));
  static constexpr int width = 4;

  static F set(float x) { return F{x, x, x, x}; }
  static float first(F x) { return x[0]; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
#ifdef __FP_FAST_FMAF
  static F fma(F a, F b, F c) {
    F out;
    for (int i = 0; i < width; ++i) out[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return out;
  }
#else
  static F fma(F a, F b, F c) { return a * b + c; }
#endif
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F abs(F x) { return (F)((I)x & 0x7fffffff); }
  static F copysign(F x, F sign) {
    return (F)(((I)x & 0x7fffffff) | ((I)sign & static_cast<int32_t>(0x80000000)));
  }
  static bool any_greater(F a, F b) {
    const I over = a > b;
    return (over[0] | over[1] | over[2] | over[3]) != 0;
  }
  static F less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static F drop_zero(F key, F x) { return key == set(0.0f) ? set(0.0f) : x; }
  static F keep_above(F key, F low, F x) { return key <= low ? set(0.0f) : x; }
  static int count_zero(F x) {
    const I zero = x == set(0.0f);
    return -(zero[0] + zero[1] + zero[2] + zero[3]);
  }
  static F keep(F x, int n, float fill) { return I{0, 1, 2, 3} < n ? x : set(fill); }
  // Two steps, each a normal power of two, so that the one rounding of a denormal result is the
  // last operation.
  static F scale_by_power(F x, F n) {
    const I whole = __builtin_convertvector(n, I);
    const I half = whole >> 1;
    return x * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
  }
  static F split(F x, F* exponent) {
    const I u = (I)x;
    *exponent = __builtin_convertvector((u >> 23) - 127, F);
    return (F)((u & 0x007fffff) | 0x3f800000);
  }
  static float max_lane(F x) {
    const float a = x[0] > x[1] ? x[0] : x[1], b = x[2] > x[3] ? x[2] : x[3];
    return a > b ? a : b;
  }

  static Sum zero_sum() { return Sum{0, 0, 0, 0}; }
  static void accumulate(Sum& sum, F x) { sum += __builtin_convertvector(x, Sum); }
  static double total(const Sum& sum) { return (sum[0] + sum[1]) + (sum[2] + sum[3]); }

  static F load(const float* x) {
    F out;
    memcpy(&out, x, sizeof(out));
    return out;
  }
  static F load(const bf16* x) {
    typedef uint16_t H __attribute__((vector_size(8)));
    typedef uint32_t U __attribute__((vector_size(16)));
    H bits;
    memcpy(&bits, x, sizeof(bits));
    return (F)(__builtin_convertvector(bits, U) << 16);
  }
  static F load(const f16* x) {
    return F{to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
  }
  template <class T>
  static F load(const T* x, int n) {
    T lanes[width] = {};
    memcpy(lanes, x, n * sizeof(T));
    return load(lanes);
  }
  template <class T>
  static void store(T* out, F x) {
    for (int i = 0; i < width; ++i) from_float(x[i], out + i);
  }
  static void store(bf16* out, F x) {
    typedef uint16_t H __attribute__((vector_size(8)));
    typedef uint32_t U __attribute__((vector_size(16)));
    const U u = (U)x;
    const U rounded = x == x ? u + 0x7fff + ((u >> 16) & 1) : u | 0x00400000;
    const H bits = __builtin_convertvector(rounded >> 16, H);
    memcpy(out, &bits, sizeof(bits));
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
};

}  // namespace
}  // namespace pyoffline
