// Panels around the vendor GEMM; see gemm.h.
//
// On MKL a panel is a strip of V whose fp32 result is rounded while it is still in cache, so the
// [C,V] or [V,D] fp32 matrix never exists. The inner size of dhidden is split too: the vendor's
// blocking loses at V = 150,000.
#include "gemm.h"

#include <algorithm>

#include "dispatch.h"
#include "dispatch_internal.h"
#include "panel.h"
#include "tile_gemm.h"
#include "tile_pack.h"
#include "vendor_gemm.h"

namespace pyoffline {

namespace {

int64_t item_size(DType type) { return type == DType::f32 ? 4 : 2; }

void* at(const Matrix& x, int64_t row, int64_t col) {
  return static_cast<char*>(x.data) + (row * x.row_stride + col) * item_size(x.type);
}

Operand plain(const Matrix& x) { return {x.data, x.row_stride, false}; }
Operand transposed(const Matrix& x) { return {x.data, x.row_stride, true}; }

float* floats(const Matrix& x, int64_t row, int64_t col) {
  return static_cast<float*>(at(x, row, col));
}

// to = beta to + from
void add_to(float* __restrict__ to, const float* __restrict__ from, int64_t n, float beta) {
  if (beta == 0.0f)
    std::copy(from, from + n, to);
  else
    for (int64_t j = 0; j < n; ++j) to[j] = beta * to[j] + from[j];
}

void tile_logits(const TileKernels& kernels, const Matrix& hidden, const Matrix& weight,
                 const Matrix& out, int threads) {
  const Kernels& array = active_kernels();
  const TileProduct product = {hidden.rows, weight.rows, hidden.cols, plain(hidden),
                               transposed(weight)};
  tile_gemm(kernels, product, threads, false, [&](const TileSum& sum) {
    for (int64_t i = 0; i < sum.rows; ++i)
      array.scale_cast(sum.data + i * sum.stride, DType::f32, at(out, sum.row + i, sum.col),
                       out.type, sum.cols, 1.0f);
  });
}

// The product turned round, logits^T = weight @ hidden^T: the weight is copied block by block as it
// lies and what is packed is hidden, once. Its strips are transposed while they are in cache.
void turned_logits(const TileKernels& kernels, const Matrix& hidden, const Matrix& weight,
                   const Matrix& out, int threads) {
  constexpr int64_t kSquare = 16, kAhead = 64;
  const Kernels& array = active_kernels();
  const TileProduct product = {weight.rows, hidden.rows, hidden.cols, plain(weight),
                               transposed(hidden)};
  tile_gemm(kernels, product, threads, false, [&](const TileSum& sum) {
    alignas(64) float turned[kSquare * kTileRows];
    for (int64_t c = 0; c < sum.cols; c += kSquare) {
      // a row of logits lies pages away from the next: the hardware does not see it coming
      for (int64_t i = c + kAhead; i < std::min(c + kAhead + kSquare, sum.cols); ++i)
        for (int64_t r = 0; r < sum.rows; r += 64 / item_size(out.type))
          __builtin_prefetch(at(out, sum.col + i, sum.row + r), 1);
      for (int64_t r = 0; r < sum.rows; r += kSquare)
        transpose_16x16(sum.data + r * sum.stride + c, sum.stride, turned + r, kTileRows);
      for (int64_t i = 0; i < std::min(kSquare, sum.cols - c); ++i)
        array.scale_cast(turned + i * kTileRows, DType::f32, at(out, sum.col + c + i, sum.row),
                         out.type, sum.rows, 1.0f);
    }
  });
}

void tile_dhidden(const TileKernels& kernels, const Matrix& dlogits, const Matrix& weight,
                  const Matrix& out, int threads, const PackedB& kept) {
  const TileProduct product = {dlogits.rows,  weight.cols,       dlogits.cols, plain(dlogits),
                               plain(weight), kTileDHiddenPanel, kept};
  tile_gemm(kernels, product, threads, false, [&](const TileSum& sum) {
    for (int64_t i = 0; i < sum.rows; ++i) {
      const float* from = sum.data + i * sum.stride;
      add_to(floats(out, sum.row + i, sum.col), from, sum.cols, sum.is_first ? 0.0f : 1.0f);
    }
  });
}

void tile_dweight(const TileKernels& kernels, const Matrix& dlogits, const Matrix& hidden,
                  const DWeight& dweight, int threads) {
  const Kernels& array = active_kernels();
  const Matrix &acc = dweight.acc, &out = dweight.out;
  const float beta = dweight.beta;
  const TileProduct product = {dlogits.cols, hidden.cols, dlogits.rows, transposed(dlogits),
                               plain(hidden)};
  tile_gemm(kernels, product, threads, false, [&](const TileSum& sum) {
    for (int64_t i = 0; i < sum.rows; ++i) {
      const float* from = sum.data + i * sum.stride;
      if (acc.data) {
        float* to = floats(acc, sum.row + i, sum.col);
        add_to(to, from, sum.cols, beta);
        from = to;
      }
      if (out.data)
        array.scale_cast(from, DType::f32, at(out, sum.row + i, sum.col), out.type, sum.cols,
                         dweight.out_scale);
    }
  });
}

}  // namespace

void gemm_logits(const Matrix& hidden, const Matrix& weight, const Matrix& out, int threads) {
  require_vendor_gemm(hidden.type);
  if (const TileKernels* tiles = tile_kernels_of(hidden.type))
    return (hidden.rows <= kTurnedRows ? turned_logits : tile_logits)(*tiles, hidden, weight, out,
                                                                      threads);
  const int64_t rows = hidden.rows, inner = hidden.cols, vocab = weight.rows;
  const Operand a = {hidden.data, hidden.row_stride, false};
  if (out.type == DType::f32) {
    vendor_gemm({hidden.type,
                 rows,
                 vocab,
                 inner,
                 a,
                 {weight.data, weight.row_stride, true},
                 static_cast<float*>(out.data),
                 out.row_stride,
                 0.0f});
    return;
  }
  const int64_t width = std::min(vocab, kLogitsPanel), ldc = width + kPad;
  PanelBuffer panel(rows * ldc);
  for (int64_t v0 = 0; v0 < vocab; v0 += width) {
    const int64_t cols = std::min(width, vocab - v0);
    vendor_gemm({hidden.type,
                 rows,
                 cols,
                 inner,
                 a,
                 {at(weight, v0, 0), weight.row_stride, true},
                 panel.get(),
                 ldc,
                 0.0f});
    scale_cast_2d(panel.get(), ldc, at(out, 0, v0), out.type, out.row_stride, rows, cols, 1.0f,
                  threads);
  }
}

void gemm_dhidden(const Matrix& dlogits, const Matrix& weight, const Matrix& out, int threads,
                  const PackedB& kept) {
  if (const TileKernels* tiles = tile_kernels_of(dlogits.type))
    return tile_dhidden(*tiles, dlogits, weight, out, threads, kept);
  const int64_t rows = dlogits.rows, vocab = dlogits.cols, width = kDHiddenPanel;
  float beta = 0.0f;
  // at least once: an empty V still has to write zeros
  for (int64_t v0 = 0; v0 < std::max<int64_t>(vocab, 1); v0 += width, beta = 1.0f)
    vendor_gemm({dlogits.type,
                 rows,
                 weight.cols,
                 std::min(width, vocab - v0),
                 {at(dlogits, 0, v0), dlogits.row_stride, false},
                 {at(weight, v0, 0), weight.row_stride, false},
                 static_cast<float*>(out.data),
                 out.row_stride,
                 beta});
}

void gemm_dweight(const Matrix& dlogits, const Matrix& hidden, const DWeight& dweight,
                  int threads) {
  require_vendor_gemm(dlogits.type);
  if (const TileKernels* tiles = tile_kernels_of(dlogits.type))
    return tile_dweight(*tiles, dlogits, hidden, dweight, threads);
  const int64_t vocab = dlogits.cols, width = std::min(vocab, kDWeightPanel);
  const Matrix &acc = dweight.acc, &out = dweight.out;
  const int64_t ldc = acc.data ? acc.row_stride : hidden.cols + kPad;
  PanelBuffer panel(acc.data ? 0 : width * ldc);
  for (int64_t v0 = 0; v0 < vocab; v0 += width) {
    const int64_t rows = std::min(width, vocab - v0);
    float* sums = acc.data ? static_cast<float*>(at(acc, v0, 0)) : panel.get();
    vendor_gemm({dlogits.type,
                 rows,
                 hidden.cols,
                 dlogits.rows,
                 {at(dlogits, 0, v0), dlogits.row_stride, true},
                 {hidden.data, hidden.row_stride, false},
                 sums,
                 ldc,
                 dweight.beta});
    if (out.data)
      scale_cast_2d(sums, ldc, at(out, v0, 0), out.type, out.row_stride, rows, hidden.cols,
                    dweight.out_scale, threads);
  }
}

}  // namespace pyoffline
