// Kernels on plain arrays, on Vec: the elementary functions for the ULP tests, scale and cast, sums
// of columns.
//
// scale_cast reads and writes each element once, one rounding; column_panel sums a panel of columns
// row by row, fp32 over 32 rows and fp64 across, in an order that depends on nothing but the shape.
// Included after sweeps.h. Not here: threads.
#pragma once

#include "sweeps.h"

namespace pyoffline {
namespace {

template <class Fn>
inline void map_array(const float* x, float* out, int64_t n, const Fn& fn) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Vec::store(out + i, fn(Vec::load(x + i)));
  const int rest = static_cast<int>(n - i);
  if (rest) Vec::store(out + i, fn(Vec::load(x + i, rest)), rest);
}

void exp_array(const float* x, float* out, int64_t n) {
  map_array(x, out, n, [](F v) { return vec_exp(v); });
}

void tanh_array(const float* x, float* out, int64_t n) {
  map_array(x, out, n, [](F v) { return vec_tanh(v); });
}

void scale_cast(const void* src, DType src_type, void* dst, DType dst_type, int64_t n,
                float scale) {
  const F factor = Vec::set(scale);
  with_type(src_type, [&](auto src_tag) {
    with_type(dst_type, [&](auto dst_tag) {
      const auto* in = static_cast<const decltype(src_tag)*>(src);
      auto* out = static_cast<decltype(dst_tag)*>(dst);
      int64_t i = 0;
      for (; i + kWidth <= n; i += kWidth) {
        Vec::store(out + i, Vec::mul(Vec::load(in + i), factor));
      }
      const int rest = static_cast<int>(n - i);
      if (rest) Vec::store(out + i, Vec::mul(Vec::load(in + i, rest), factor), rest);
    });
  });
}

template <class T>
void column_panel_of(const T* x, int64_t stride, int64_t rows, int64_t cols, double* out) {
  float part[kPanel];
  for (int64_t c = 0; c < cols; ++c) out[c] = 0.0;
  for (int64_t begin = 0; begin < rows; begin += 32) {
    const int64_t end = begin + 32 < rows ? begin + 32 : rows;
    for (int64_t c = 0; c < cols; ++c) part[c] = 0.0f;
    for (int64_t r = begin; r < end; ++r) {
      const T* line = x + r * stride;
      int64_t c = 0;
      for (; c + kWidth <= cols; c += kWidth) {
        Vec::store(part + c, Vec::add(Vec::load(part + c), Vec::load(line + c)));
      }
      for (; c < cols; ++c) part[c] += to_float(line[c]);
    }
    for (int64_t c = 0; c < cols; ++c) out[c] += part[c];
  }
}

void column_panel(const void* x, DType type, int64_t stride, int64_t rows, int64_t cols,
                  double* out) {
  with_type(type, [&](auto tag) {
    column_panel_of(static_cast<const decltype(tag)*>(x), stride, rows, cols, out);
  });
}

}  // namespace
}  // namespace pyoffline
