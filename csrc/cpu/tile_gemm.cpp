// Blocking and threads around the tile kernel; see tile_gemm.h.
//
// A panel of b (at most kPanelElements) is packed once for all rows, shared by the team; a thread
// packs a block of a and multiplies it with the panel's tiles into a strip of fp32 sums in its own
// L2, while its next block of a is on the way. The shapes that the kernel is called with are few
// whatever the product's: it is generated once per shape and thread, and kept.
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

// b[:, begin : begin + cols) as tiles [cols / kCols][k / 2][kCols][2]; a task reads b as it lies.
void pack_panel(const TileProduct& p, int64_t begin, int64_t cols, int threads, uint16_t* panel) {
  const int64_t inner = round_up(p.k, kInnerStep), tiles = count(cols, kCols);
  const auto pack_tile = [&](int64_t tile, int64_t k0, int64_t k_out) {
    const int64_t n = std::min(kCols, cols - tile * kCols), k = std::min(k_out, p.k - k0);
    const Bits source = {at(p.b, k0, begin + tile * kCols), p.b.row_stride};
    uint16_t* out = panel + tile * kCols * inner + k0 * kCols;
    (p.b.transposed ? pack_pairs_transposed : pack_pairs)(source, k, n, k_out, kCols, out);
  };
  if (p.b.transposed) {
    parallel_for(threads, tiles, [&](int64_t tile) { pack_tile(tile, 0, inner); });
    return;
  }
  parallel_for(threads, inner / kInnerStep, [&](int64_t task) {
    for (int64_t k0 = task * kInnerStep; k0 < (task + 1) * kInnerStep; k0 += 2)
      for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(tile, k0, 2);
  });
}

// The scratch of one thread: a strip of sums, then a block of a.
constexpr int64_t kStripCount = kRows * (kStripStride + kInner / 2);

struct Strip {
  int64_t row, rows, col, cols;  // col within the panel
};

// A block of a as it is stored, for k in [k0, k0 + k): `rows` runs of `cols` elements.
struct Block {
  Bits bits;
  int64_t rows, cols;
};

Block stored_block(const TileProduct& p, int64_t row, int64_t rows, int64_t k0) {
  const int64_t k = std::min(kInner, p.k - k0);
  const Bits bits = {at(p.a, row, k0), p.a.row_stride};
  return p.a.transposed ? Block{bits, k, rows} : Block{bits, rows, k};
}

// Part `part` of `parts` of a block is pulled into L2. A block lies in short runs, a row of the
// matrix apart: the hardware does not see the next one coming, and waiting for it costs 5 %.
void prefetch(const Block& block, int64_t part, int64_t parts) {
  const int64_t lines = count(block.cols, 32), total = block.rows * lines;
  for (int64_t i = total * part / parts; i < total * (part + 1) / parts; ++i)
    __builtin_prefetch(block.bits.data + i / lines * block.bits.stride + i % lines * 32, 0, 2);
}

// next: the block of a that this thread needs after the strip.
void multiply_strip(const TileKernels& kernels, const TileProduct& p, const Strip& s,
                    const Block& next, const uint16_t* panel, float* sums) {
  uint16_t* packed = reinterpret_cast<uint16_t*>(sums + kRows * kStripStride);
  const int64_t inner = round_up(p.k, kInnerStep), rows = round_up(s.rows, kRowStep);
  if (p.k == 0) std::memset(sums, 0, kRows * kStripStride * sizeof(float));
  for (int64_t k0 = 0; k0 < p.k; k0 += kInner) {
    const Block block = stored_block(p, s.row, s.rows, k0);
    if (p.a.transposed) {
      pack_transpose(block.bits, block.rows, block.cols, rows, kInner, packed);
    } else {
      pack_copy(block.bits, block.rows, block.cols, rows, kInner, packed);
    }
    const bool is_last = k0 + kInner >= p.k;
    const Block ahead = is_last ? next : stored_block(p, s.row, s.rows, k0 + kInner);
    const int64_t padded = round_up(std::min(kInner, p.k - k0), kInnerStep);
    for (int64_t n0 = 0; n0 < s.cols; n0 += kCols) {
      prefetch(ahead, n0 / kCols, count(s.cols, kCols));
      kernels.multiply(rows, kCols, padded, kInner, kCols, kStripStride, k0 > 0, packed,
                       panel + (s.col + n0) * inner + k0 * kCols, sums + n0, true);
    }
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
    const int64_t cols = std::min(width, p.n - begin);
    const int64_t strip = round_up(count(cols, count(cols, kStrip)), kCols);  // evenly cut
    const int64_t strips = count(cols, strip);
    // a task is one strip, or all of a row block's one after the other
    const int64_t lanes = in_order ? 1 : strips, height = block_rows(p.m, lanes, threads);
    const int64_t tasks = count(p.m, height) * lanes;
    const auto rows_at = [&](int64_t row) { return std::min(height, p.m - row); };
    pack_panel(p, begin, cols, threads, packed);
    std::atomic<int64_t> next{0};
    parallel_for(threads, threads, [&](int64_t thread) {
      float* sums = scratch->strip(thread, kStripCount);
      for (int64_t task = next++, after = 0; task < tasks; task = after) {
        after = next++;
        const int64_t row = task / lanes * height, row_after = after / lanes * height;
        Block ahead = {};
        if (after < tasks && p.k > 0) ahead = stored_block(p, row_after, rows_at(row_after), 0);
        for (int64_t i = task % lanes; i < strips; i += lanes) {
          const Strip s = {row, rows_at(row), i * strip, std::min(strip, cols - i * strip)};
          multiply_strip(kernels, p, s, ahead, packed, sums);
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
