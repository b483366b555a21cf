// Packing for tile_gemm.cpp: blocks of bf16 copied, transposed or interleaved in pairs of rows; and
// squares of its sums transposed.
//
// Inner blocks in whole cache lines where the CPU has AVX-512 (tile_pack_avx512.h), their edges and
// other CPUs by SSE2, what is left element by element. What lies beyond the block is filled with
// zeros up to the padded size.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "tile_pack_avx512.h"

namespace pyoffline {

// A block of a matrix as stored: element (i, j) is data[i * stride + j].
struct Bits {
  const uint16_t* data;
  int64_t stride;
};

namespace pack_detail {

#if defined(__SSE2__)
inline __m128i load(const uint16_t* x) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
}
inline void store(uint16_t* x, __m128i value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(x), value);
}

// dst[j * dst_stride + i] = src(i, j), 8 x 8
inline void transpose_8x8(const Bits& src, uint16_t* dst, int64_t dst_stride) {
  __m128i r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = load(src.data + i * src.stride);
  for (int i = 0; i < 4; ++i) {
    s[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
    s[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
  }
  for (int half = 0; half < 2; ++half) {
    const __m128i lo0 = _mm_unpacklo_epi32(s[half], s[half + 2]);
    const __m128i hi0 = _mm_unpackhi_epi32(s[half], s[half + 2]);
    const __m128i lo1 = _mm_unpacklo_epi32(s[half + 4], s[half + 6]);
    const __m128i hi1 = _mm_unpackhi_epi32(s[half + 4], s[half + 6]);
    uint16_t* out = dst + 4 * half * dst_stride;
    store(out, _mm_unpacklo_epi64(lo0, lo1));
    store(out + dst_stride, _mm_unpackhi_epi64(lo0, lo1));
    store(out + 2 * dst_stride, _mm_unpacklo_epi64(hi0, hi1));
    store(out + 3 * dst_stride, _mm_unpackhi_epi64(hi0, hi1));
  }
}

// dst[(j / 2) * 2 * dst_stride + 2 * i + j % 2] = src(i, j): 4 rows of 8, moved as pairs
inline void transpose_pairs_4x8(const Bits& src, uint16_t* dst, int64_t dst_stride) {
  const __m128i r0 = load(src.data), r1 = load(src.data + src.stride);
  const __m128i r2 = load(src.data + 2 * src.stride), r3 = load(src.data + 3 * src.stride);
  const __m128i a = _mm_unpacklo_epi32(r0, r1), b = _mm_unpackhi_epi32(r0, r1);
  const __m128i c = _mm_unpacklo_epi32(r2, r3), d = _mm_unpackhi_epi32(r2, r3);
  store(dst, _mm_unpacklo_epi64(a, c));
  store(dst + 2 * dst_stride, _mm_unpackhi_epi64(a, c));
  store(dst + 4 * dst_stride, _mm_unpacklo_epi64(b, d));
  store(dst + 6 * dst_stride, _mm_unpackhi_epi64(b, d));
}

// dst[2 * j + i] = row i, 8 columns of two rows
inline void interleave_2x8(const uint16_t* even, const uint16_t* odd, uint16_t* dst) {
  const __m128i x = load(even), y = load(odd);
  store(dst, _mm_unpacklo_epi16(x, y));
  store(dst + 8, _mm_unpackhi_epi16(x, y));
}
constexpr int64_t kWide = 8;
#else
constexpr int64_t kWide = INT64_MAX;  // never reached: element by element
inline void transpose_8x8(const Bits&, uint16_t*, int64_t) {}
inline void transpose_pairs_4x8(const Bits&, uint16_t*, int64_t) {}
inline void interleave_2x8(const uint16_t*, const uint16_t*, uint16_t*) {}
#endif

// block(i, j) for every whole rows x cols block of [0, m) x [0, n) that does not lie in
// [0, done_m) x [0, done_n): what wider blocks have done.
template <class Block>
inline void for_blocks(int64_t m, int64_t n, int64_t rows, int64_t cols, int64_t done_m,
                       int64_t done_n, const Block& block) {
  for (int64_t i = 0; i + rows <= m; i += rows)
    for (int64_t j = i < done_m ? done_n : 0; j + cols <= n; j += cols) block(i, j);
}

// The largest multiple of step up to n, 0 without wide blocks.
inline int64_t wide_part(int64_t n, int64_t step) { return wide_pack() ? n / step * step : 0; }

}  // namespace pack_detail

// dst[j * dst_stride + i] = src[i * stride + j], 16 x 16.
inline void transpose_16x16(const float* src, int64_t stride, float* dst, int64_t dst_stride) {
  if (pack_detail::wide_pack()) {
    pack_detail::wide_transpose_16x16(src, stride, dst, dst_stride);
    return;
  }
  for (int64_t j = 0; j < 16; ++j)
    for (int64_t i = 0; i < 16; ++i) dst[j * dst_stride + i] = src[i * stride + j];
}

// out[rows_out][width]: rows x cols of src, zeros beyond. width is the row length of out.
inline void pack_copy(const Bits& src, int64_t rows, int64_t cols, int64_t rows_out, int64_t width,
                      uint16_t* out) {
  for (int64_t i = 0; i < rows_out; ++i, out += width) {
    const int64_t count = i < rows ? cols : 0;
    if (count) std::memcpy(out, src.data + i * src.stride, count * 2);
    std::memset(out + count, 0, (width - count) * 2);
  }
}

// out[cols_out][width]: the transpose of rows x cols of src, zeros beyond.
inline void pack_transpose(const Bits& src, int64_t rows, int64_t cols, int64_t cols_out,
                           int64_t width, uint16_t* out) {
  using namespace pack_detail;
  const int64_t wide_rows = kWide == 8 ? rows / 8 * 8 : 0,
                wide_cols = kWide == 8 ? cols / 8 * 8 : 0;
  const int64_t done_rows = wide_part(rows, 32), done_cols = wide_part(cols, 32);
  for_blocks(done_rows, done_cols, 32, 32, 0, 0, [&](int64_t i, int64_t j) {
    wide_transpose_32x32(src.data + i * src.stride + j, src.stride, out + j * width + i, width);
  });
  for_blocks(wide_rows, wide_cols, 8, 8, done_rows, done_cols, [&](int64_t i, int64_t j) {
    transpose_8x8({src.data + i * src.stride + j, src.stride}, out + j * width + i, width);
  });
  for (int64_t j = 0; j < cols_out; ++j) {
    const int64_t count = j < cols ? rows : 0;
    for (int64_t i = j < wide_cols ? wide_rows : 0; i < count; ++i)
      out[j * width + i] = src.data[i * src.stride + j];
    std::memset(out + j * width + count, 0, (width - count) * 2);
  }
}

// out[k_out / 2][width][2]: element (k, n) of src (stored k by n) at [k / 2][n][k % 2].
inline void pack_pairs(const Bits& src, int64_t k, int64_t n, int64_t k_out, int64_t width,
                       uint16_t* out) {
  using namespace pack_detail;
  for (int64_t i = 0; i < k_out; i += 2, out += 2 * width) {
    const int64_t count = i < k ? n : 0, wide = i + 1 < k && kWide == 8 ? n / 8 * 8 : 0;
    const uint16_t *even = src.data + i * src.stride, *odd = even + src.stride;
    const int64_t done = wide_part(wide, 32);
    for (int64_t j = 0; j < done; j += 32) {
      // the block beside this one is next: short runs a row apart, which the hardware does not see
      __builtin_prefetch(even + count + j);
      __builtin_prefetch(odd + count + j);
      wide_interleave_2x32(even + j, odd + j, out + 2 * j);
    }
    for (int64_t j = done; j < wide; j += 8) interleave_2x8(even + j, odd + j, out + 2 * j);
    for (int64_t j = wide; j < count; ++j) {
      out[2 * j] = even[j];
      out[2 * j + 1] = i + 1 < k ? odd[j] : 0;
    }
    std::memset(out + 2 * count, 0, 4 * (width - count));
  }
}

// The same of a matrix stored n by k.
inline void pack_pairs_transposed(const Bits& src, int64_t k, int64_t n, int64_t k_out,
                                  int64_t width, uint16_t* out) {
  using namespace pack_detail;
  const int64_t wide_n = kWide == 8 ? n / 4 * 4 : 0, wide_k = kWide == 8 ? k / 8 * 8 : 0;
  const int64_t done_n = wide_part(n, 16), done_k = wide_part(k, 32);
  for_blocks(done_n, done_k, 16, 32, 0, 0, [&](int64_t i, int64_t j) {
    wide_transpose_16x16(src.data + i * src.stride + j, src.stride, out + j * width + 2 * i,
                         2 * width);
  });
  for_blocks(wide_n, wide_k, 4, 8, done_n, done_k, [&](int64_t i, int64_t j) {
    transpose_pairs_4x8({src.data + i * src.stride + j, src.stride}, out + j * width + 2 * i,
                        width);
  });
  for (int64_t i = 0; i < width; ++i)
    for (int64_t j = i < wide_n ? wide_k : 0; j < k_out; ++j)
      out[(j / 2) * 2 * width + 2 * i + j % 2] = i < n && j < k ? src.data[i * src.stride + j] : 0;
}

}  // namespace pyoffline
