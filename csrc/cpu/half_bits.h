// bf16 and fp16 as bits, and their scalar conversions: round to nearest even, NaN stays a (quiet)
// NaN, denormals kept.
//
// In an unnamed namespace on purpose: this header is compiled with AVX-512 flags in one file and
// without in another, and a function with external linkage could be shared between them by the
// linker (SIGILL on an older CPU).
#pragma once

#include <stdint.h>
#include <string.h>

namespace pyoffline {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) {  // inf and NaN; a NaN becomes quiet
    return float_of(sign | 0x70000000 | magnitude | (magnitude > 0x0f800000 ? 0x00400000 : 0));
  }
  return float_of(sign | bits_of(float_of(magnitude) * 0x1p112f));
}

inline void from_float(float x, float* out) { *out = x; }

inline void from_float(float x, bf16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = x != x ? u | 0x00400000 : u + 0x7fff + ((u >> 16) & 1);
  out->bits = static_cast<uint16_t>(rounded >> 16);
}

inline void from_float(float x, f16* out) {
  const uint32_t u = bits_of(x);
  const uint32_t magnitude = u & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x477ff000) {  // 65520 and above round to inf
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: the adder rounds at 2^-24
    half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>((u >> 16 & 0x8000) | half);
}

}  // namespace
}  // namespace pyoffline
