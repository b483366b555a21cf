// Blocking and threads around the tile kernel; see tile_gemm.h.
//
// A panel of b (at most kPanelElements) is packed once for all rows, shared by the team; a thread
// packs a block of a and multiplies it with the panel's tiles into a strip of fp32 sums in its own
// L2. The shapes that the kernel is called with are few whatever the product's: it is generated
// once per shape and thread, and kept.
#include "tile_gemm.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "panel.h"
#include "parallel.h"
#include "tile_pack.h"

namespace pyoffline {

namespace {

// One core of a Zen 4 has 1 MiB of L2: a block of a 128 KiB, a tile of b 64 KiB, a strip 520 KiB.
// With one such core the kernel reaches 232 GFLOP/s whatever these sizes (2026-11-28).
constexpr int64_t kRows = 128, kCols = 64, kInner = 512;
constexpr int64_t kRowStep = 32, kInnerStep = 32;  // whole AMX tiles
constexpr int64_t kStrip = 1024, kStripStride = kStrip + kPad;
constexpr int64_t kPanelElements = 4 << 20, kMaxPanel = 4096;

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
int64_t count(int64_t x, int64_t step) { return (x + step - 1) / step; }

const uint16_t* at(const Operand& x, int64_t i, int64_t j) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  return x.transposed ? data + j * x.row_stride + i : data + i * x.row_stride + j;
}

// Columns of b that are packed at a time.
int64_t panel_width(int64_t n, int64_t k) {
  const int64_t fit = kPanelElements / std::max<int64_t>(round_up(k, kInnerStep), 1);
  return std::min(round_up(n, kCols), std::clamp(fit / kCols * kCols, kCols, kMaxPanel));
}

// b[:, begin : begin + cols) as tiles [cols / kCols][k / 2][kCols][2].
void pack_panel(const TileProduct& p, int64_t begin, int64_t cols, int threads, uint16_t* panel) {
  const int64_t inner = round_up(p.k, kInnerStep), blocks = count(p.k, kInner);
  parallel_for(threads, count(cols, kCols) * blocks, [&](int64_t task) {
    const int64_t n0 = task / blocks * kCols, k0 = task % blocks * kInner;
    const int64_t n = std::min(kCols, cols - n0), k = std::min(kInner, p.k - k0);
    const Bits source = {at(p.b, k0, begin + n0), p.b.row_stride};
    uint16_t* out = panel + n0 * inner + k0 * kCols;
    const int64_t padded = round_up(k, kInnerStep);
    if (p.b.transposed) {
      pack_pairs_transposed(source, k, n, padded, kCols, out);
    } else {
      pack_pairs(source, k, n, padded, kCols, out);
    }
  });
}

// The scratch of one thread: a strip of sums, then a block of a.
constexpr int64_t kStripCount = kRows * (kStripStride + kInner / 2);

struct Strip {
  int64_t row, rows, col, cols;  // col within the panel
};

void multiply_strip(const TileKernels& kernels, const TileProduct& p, const Strip& s,
                    const uint16_t* panel, float* sums) {
  uint16_t* block = reinterpret_cast<uint16_t*>(sums + kRows * kStripStride);
  const int64_t inner = round_up(p.k, kInnerStep), rows = round_up(s.rows, kRowStep);
  if (p.k == 0) std::memset(sums, 0, kRows * kStripStride * sizeof(float));
  for (int64_t k0 = 0; k0 < p.k; k0 += kInner) {
    const int64_t k = std::min(kInner, p.k - k0), padded = round_up(k, kInnerStep);
    const Bits source = {at(p.a, s.row, k0), p.a.row_stride};
    if (p.a.transposed) {
      pack_transpose(source, k, s.rows, rows, kInner, block);
    } else {
      pack_copy(source, s.rows, k, rows, kInner, block);
    }
    for (int64_t n0 = s.col; n0 < s.col + s.cols; n0 += kCols)
      kernels.multiply(rows, kCols, padded, kInner, kCols, kStripStride, k0 > 0, block,
                       panel + n0 * inner + k0 * kCols, sums + n0 - s.col, true);
  }
}

// Rows of a block: fewer where a small product would leave threads without work.
int64_t block_rows(int64_t m, int64_t strips, int threads) {
  int64_t rows = kRows;
  while (rows > kRowStep && count(m, rows) * strips < 2 * threads) rows /= 2;
  return rows;
}

}  // namespace

void tile_gemm(const TileKernels& kernels, const TileProduct& p, int threads, bool in_order,
               TileScratch* scratch, const TileDone& done) {
  if (p.m == 0 || p.n == 0) return;
  const int64_t width = panel_width(p.n, p.k);
  // two bf16 in a float's place
  float* panel = scratch->panel(width * round_up(p.k, kInnerStep) / 2);
  uint16_t* packed = reinterpret_cast<uint16_t*>(panel);
  for (int64_t begin = 0; begin < p.n; begin += width) {
    const int64_t cols = std::min(width, p.n - begin), strips = count(cols, kStrip);
    const int64_t strip = round_up(count(cols, strips), kCols);  // evenly cut
    const int64_t lanes = in_order ? 1 : strips, height = block_rows(p.m, lanes, threads);
    const int64_t tasks = count(p.m, height) * lanes;
    pack_panel(p, begin, cols, threads, packed);
    std::atomic<int64_t> next{0};
    parallel_for(threads, threads, [&](int64_t thread) {
      float* sums = scratch->strip(thread, kStripCount);
      for (int64_t task = next++; task < tasks; task = next++) {
        const int64_t row = task / lanes * height, lane = task % lanes;
        for (int64_t i = lane; i < strips; i += lanes) {
          const int64_t col = i * strip;
          if (col >= cols) break;
          const Strip s = {row, std::min(height, p.m - row), col, std::min(strip, cols - col)};
          multiply_strip(kernels, p, s, packed, sums);
          done({sums, kStripStride, s.row, begin + s.col, s.rows, s.cols});
        }
      }
      kernels.release(true);
    });
  }
}

int64_t tile_gemm_nbytes(int64_t n, int64_t k, int threads) {
  const int64_t panel = panel_width(n, k) * round_up(k, kInnerStep) * 2;
  return panel + threads * kStripCount * static_cast<int64_t>(sizeof(float));
}

}  // namespace pyoffline
