// The inner blocks of tile_pack.h in whole cache lines, for CPUs with AVX-512 BW: every one that
// has a bf16 tile kernel.
//
// Compiled for that instruction set by attribute, whatever the file's flags; the caller asks
// wide_pack() first. A weight of 151936 x 896 transposed on two Zen 4 cores: 0.030 s in SSE2, 0.016
// here (2026-11-28); storing whole lines in SSE2 alone had won nothing.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
// GCC 12 reports its own undefined vectors at every inlined use (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace pyoffline {
namespace pack_detail {

inline bool cpu_packs_wide() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#else
  return false;
#endif
}

// Whether the functions below may be called; tests clear it.
inline bool& wide_pack() {
  static bool allowed = cpu_packs_wide();
  return allowed;
}

#if defined(__x86_64__)
#define PYOFFLINE_WIDE __attribute__((target("avx512f,avx512bw")))

// Transposes 16 x 16 elements of 32 bits in place.
PYOFFLINE_WIDE inline void transpose_dwords(__m512i r[16]) {
  __m512i s[16];
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      r[i + 2 * half] = _mm512_unpacklo_epi64(s[i + half], s[i + half + 2]);
      r[i + 2 * half + 1] = _mm512_unpackhi_epi64(s[i + half], s[i + half + 2]);
    }
  // r[4 g + c], quarter q: rows 4 g to 4 g + 3 of column 4 q + c
  for (int c = 0; c < 4; ++c) {
    const __m512i even_lo = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
    const __m512i odd_lo = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
    const __m512i even_hi = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
    const __m512i odd_hi = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
    s[c] = _mm512_shuffle_i32x4(even_lo, even_hi, 0x88);
    s[4 + c] = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88);
    s[8 + c] = _mm512_shuffle_i32x4(even_lo, even_hi, 0xdd);
    s[12 + c] = _mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = s[i];
}

// Row j of dst is column j of src, 16 x 16 elements of 32 bits; strides in elements of T. T is
// float, or bf16 moved as pairs: dst[(j / 2) * dst_stride + 2 * i + j % 2] = src(i, j), 16 x 32.
template <class T>
PYOFFLINE_WIDE inline void wide_transpose_16x16(const T* src, int64_t stride, T* dst,
                                                int64_t dst_stride) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src + i * stride);
  transpose_dwords(r);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(dst + i * dst_stride, r[i]);
}

// dst[2 * j + i] = row i, 32 columns of two rows
PYOFFLINE_WIDE inline void wide_interleave_2x32(const uint16_t* even, const uint16_t* odd,
                                                uint16_t* dst) {
  // word 2 j from one row, word 2 j + 1 from the other (index bit 5)
  const __m512i step =
      _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                       0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                       0x00230003, 0x00220002, 0x00210001, 0x00200000);
  const __m512i x = _mm512_loadu_si512(even), y = _mm512_loadu_si512(odd);
  const __m512i second = _mm512_add_epi16(step, _mm512_set1_epi16(16));
  _mm512_storeu_si512(dst, _mm512_permutex2var_epi16(x, step, y));
  _mm512_storeu_si512(dst + 32, _mm512_permutex2var_epi16(x, second, y));
}

// dst[j * dst_stride + i] = src(i, j), 32 x 32
PYOFFLINE_WIDE inline void wide_transpose_32x32(const uint16_t* src, int64_t stride, uint16_t* dst,
                                                int64_t dst_stride) {
  uint16_t pairs[16][64];
  for (int i = 0; i < 16; ++i)
    wide_interleave_2x32(src + 2 * i * stride, src + (2 * i + 1) * stride, pairs[i]);
  for (int half = 0; half < 2; ++half)
    wide_transpose_16x16(pairs[0] + 32 * half, 64, dst + 16 * half * dst_stride, dst_stride);
}

#undef PYOFFLINE_WIDE
#else
template <class T>
inline void wide_transpose_16x16(const T*, int64_t, T*, int64_t) {}
inline void wide_interleave_2x32(const uint16_t*, const uint16_t*, uint16_t*) {}
inline void wide_transpose_32x32(const uint16_t*, int64_t, uint16_t*, int64_t) {}
#endif

}  // namespace pack_detail
}  // namespace pyoffline
