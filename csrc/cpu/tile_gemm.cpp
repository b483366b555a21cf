// Blocking and threads around the tile kernel; see tile_gemm.h.
//
// A panel of b (at most TileProduct::panel elements) is packed once for all rows, shared by the
// team; a thread packs a block of a and multiplies it with the panel's tiles into a strip of fp32
// sums in its own L2, while its next block of a and its share of the next panel are on the way. The
// shapes that the kernel is called with are few whatever the product's: it is generated once per
// shape and thread, and kept.
#include "tile_gemm.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "panel.h"
#include "parallel.h"
#include "tile_pack.h"

namespace pyoffline {

namespace {

// One core of a Zen 4 has 1 MiB of L2: a block of a 128 KiB, a tile of b 128 KiB, a strip 260 KiB.
// The kernel alone reaches 232 GFLOP/s on such a core whatever the sizes. Around it 128 x 512
// lost: the strip is read and written once more for every block of k (logits product against
// torch.mm's, k = 896 | 2048: 1.03|1.03 with 128 x 512, 1.01|0.99 with 64 x 1024; 2026-11-28).
constexpr int64_t kRows = kTileRows, kCols = 64, kInner = 1024;
constexpr int64_t kRowStep = 16, kColStep = 16, kInnerStep = 32;  // an AMX tile
constexpr int64_t kStrip = 1024, kStripStride = kStrip + kPad;
constexpr int64_t kMaxPanel = 4096;

// Row length of a packed block of a: an odd number of cache lines, so that its rows fall into
// different sets of L1. (dhidden, rows of 2 KiB: 394 GFLOP/s in the kernel, of 2112 bytes 438.)
constexpr int64_t row_length(int64_t k) { return k / 32 % 2 ? k : k + 32; }

int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }
int64_t count(int64_t x, int64_t step) { return (x + step - 1) / step; }

const uint16_t* at(const Operand& x, int64_t i, int64_t j) {
  const uint16_t* data = static_cast<const uint16_t*>(x.data);
  return x.transposed ? data + j * x.row_stride + i : data + i * x.row_stride + j;
}

// rows x cols of an operand as stored: `runs` runs of `length` elements.
struct Block {
  Bits bits;
  int64_t runs, length;
  int64_t lines() const { return runs * count(length, 32); }
};

Block stored(const Operand& x, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  const Bits bits = {at(x, row, col), x.row_stride};
  return x.transposed ? Block{bits, cols, rows} : Block{bits, rows, cols};
}

// Pulls a block into L2, some cache lines at every call. A block lies in short runs, a row of the
// matrix apart: the hardware does not see the next one coming.
class Prefetch {
 public:
  // Lines [from, to) of the block in `calls` calls.
  Prefetch(const Block& block, int64_t from, int64_t to, int64_t calls)
      : block_(block),
        line_(from),
        end_(to),
        step_(count(to - from, std::max<int64_t>(calls, 1))) {}
  Prefetch(const Block& block, int64_t calls) : Prefetch(block, 0, block.lines(), calls) {}
  void some() {
    const int64_t in_run = count(block_.length, 32), end = std::min(end_, line_ + step_);
    for (; line_ < end; ++line_)
      __builtin_prefetch(
          block_.bits.data + line_ / in_run * block_.bits.stride + line_ % in_run * 32, 0, 2);
  }

 private:
  Block block_;
  int64_t line_, end_, step_;
};

// What is packed of b at a time: rows [k0, k0 + k) and columns [n0, n0 + n).
struct Panel {
  int64_t k0, k, n0, n;
  // Of k in one call of the kernel: at most kInner, evenly cut.
  int64_t block() const {
    return round_up(count(k, std::max<int64_t>(count(k, kInner), 1)), kInnerStep);
  }
};

// Columns of b that are packed at a time.
int64_t panel_width(int64_t n, int64_t k, int64_t elements) {
  const int64_t fit = elements / std::max<int64_t>(round_up(k, kInnerStep), 1);
  return std::min(round_up(n, kCols), std::clamp(fit / kCols * kCols, kCols, kMaxPanel));
}

std::vector<Panel> panels_of(const TileProduct& p) {
  const int64_t depth = p.k_panel ? p.k_panel : std::max<int64_t>(p.k, 1);
  const int64_t width = panel_width(p.n, std::min(depth, p.k), p.panel);
  std::vector<Panel> panels;
  for (int64_t k0 = 0; k0 < std::max<int64_t>(p.k, 1); k0 += depth)  // at least once
    for (int64_t n0 = 0; n0 < p.n; n0 += width)
      panels.push_back({k0, std::min(depth, p.k - k0), n0, std::min(width, p.n - n0)});
  return panels;
}

int64_t packed_count(const Panel& panel) {
  return round_up(panel.n, kCols) * round_up(panel.k, kInnerStep);
}

// The panel as tiles [n / kCols][k / 2][kCols][2]; a task reads b as it lies.
void pack_panel(const Operand& b, const Panel& panel, int threads, uint16_t* packed) {
  const int64_t inner = round_up(panel.k, kInnerStep), tiles = count(panel.n, kCols);
  const auto pack_tile = [&](int64_t tile, int64_t k0, int64_t k_out) {
    const int64_t n = std::min(kCols, panel.n - tile * kCols), k = std::min(k_out, panel.k - k0);
    const Bits source = {at(b, panel.k0 + k0, panel.n0 + tile * kCols), b.row_stride};
    uint16_t* out = packed + tile * kCols * inner + k0 * kCols;
    (b.transposed ? pack_pairs_transposed : pack_pairs)(source, k, n, k_out, kCols, out);
  };
  if (b.transposed) {
    parallel_for(threads, tiles, [&](int64_t tile) { pack_tile(tile, 0, inner); });
    return;
  }
  parallel_for(threads, inner / kInnerStep, [&](int64_t step) {
    for (int64_t tile = 0; tile < tiles; ++tile) pack_tile(tile, step * kInnerStep, kInnerStep);
  });
}

// The buffers of one product: their pages are touched once, by the thread that uses them.
class TileScratch {
 public:
  explicit TileScratch(int threads) : strips_(threads) {}
  float* panel(int64_t count) { return grown(&panel_, count); }
  float* strip(int64_t thread, int64_t count) { return grown(&strips_[thread], count); }

 private:
  struct Buffer {
    std::unique_ptr<PanelBuffer> data;
    int64_t count = 0;
  };
  static float* grown(Buffer* buffer, int64_t count) {
    if (!buffer->data || buffer->count < count) {
      buffer->data = std::make_unique<PanelBuffer>(count);
      buffer->count = count;
    }
    return buffer->data->get();
  }
  Buffer panel_;
  std::vector<Buffer> strips_;
};

// The scratch of one thread: a strip of sums, then a block of a.
constexpr int64_t kStripCount = kRows * (kStripStride + row_length(kInner) / 2);

// What every panel of a call shares.
struct Work {
  const TileKernels& kernels;
  const TileProduct& product;
  const TileDone& done;
  int threads;
  bool in_order;
  TileScratch scratch;
  uint16_t* packed;  // the panel
};

// Rows of the result, columns of the panel. same_rows: as the strip before it on this thread.
struct Strip {
  int64_t row, rows, col, cols;
  bool same_rows;
};

// The first block of a that a strip of these rows needs.
Block first_block(const Work& work, const Panel& panel, int64_t row, int64_t rows) {
  if (panel.k == 0 || rows <= 0) return {};
  return stored(work.product.a, row, rows, panel.k0, std::min(panel.block(), panel.k));
}

// next: the block of a that this thread needs after the strip. beside: more to pull in meanwhile.
void multiply_strip(const Work& work, const Panel& panel, const Strip& s, const Block& next,
                    float* sums, Prefetch* beside) {
  const Operand& a = work.product.a;
  uint16_t* left = reinterpret_cast<uint16_t*>(sums + kRows * kStripStride);
  const int64_t inner = round_up(panel.k, kInnerStep), rows = round_up(s.rows, kRowStep);
  if (panel.k == 0) std::memset(sums, 0, kRows * kStripStride * sizeof(float));
  const int64_t depth = panel.block(), length = row_length(depth);
  for (int64_t k0 = 0; k0 < panel.k; k0 += depth) {
    const int64_t k = std::min(depth, panel.k - k0), left_over = panel.k - k0 - k;
    const Block block = stored(a, s.row, s.rows, panel.k0 + k0, k);
    if (!s.same_rows || k < panel.k)
      (a.transposed ? pack_transpose : pack_copy)(block.bits, block.runs, block.length, rows,
                                                  length, left);
    Block ahead = next;
    if (left_over > 0)
      ahead = stored(a, s.row, s.rows, panel.k0 + k0 + k, std::min(depth, left_over));
    Prefetch prefetch(ahead, count(s.cols, kCols));
    for (int64_t n0 = 0; n0 < s.cols; n0 += kCols) {
      prefetch.some();
      beside->some();
      const int64_t n = round_up(std::min(kCols, s.cols - n0), kColStep);
      work.kernels.multiply(rows, n, round_up(k, kInnerStep), length, kCols, kStripStride, k0 > 0,
                            left, work.packed + (s.col + n0) * inner + k0 * kCols, sums + n0, true);
    }
  }
}

// Rows of the result cut into blocks of whole steps, of at most kRows, all but evenly high. The
// higher ones come first: whoever takes the last blocks of a panel then ends about when the others
// do. (416 rows on two threads: 208 each, not 192 and 224; dhidden 0.955.)
struct RowBlocks {
  int64_t m, steps, number;
  int64_t row(int64_t i) const {
    const int64_t low = steps / number, higher = std::min(i, steps % number);
    return std::min(m, (i * low + higher) * kRowStep);
  }
};

// As few blocks as give the threads equal work: a panel ends when the last thread is done. (Of 11
// blocks one of two threads has six, and the other waits a sixth of its time.)
RowBlocks cut_rows(int64_t m, int64_t lanes, int threads) {
  const int64_t steps = count(m, kRowStep), fewest = count(steps, kRows / kRowStep);
  const auto longest = [&](int64_t n) {  // of the threads, in steps of the mean block
    return static_cast<double>(count(n * lanes, threads)) * steps / n;
  };
  int64_t best = fewest;
  for (int64_t n = fewest + 1; n <= std::min(steps, fewest + 2 * threads); ++n)
    if (longest(n) < 0.99 * longest(best)) best = n;
  return {m, steps, best};
}

// All rows times one panel, while next_panel is pulled in. A task is one strip or, in order, all of
// a row block's.
void multiply_panel(Work& work, const Panel& panel, const Block& next_panel) {
  const int64_t m = work.product.m;
  const int64_t width = round_up(count(panel.n, count(panel.n, kStrip)), kCols);  // evenly cut
  const int64_t strips = count(panel.n, width), lanes = work.in_order ? 1 : strips;
  const RowBlocks blocks = cut_rows(m, lanes, work.threads);
  const int64_t tasks = blocks.number * lanes;
  const int64_t calls = count(panel.k, kInner) * count(panel.n, kCols) / lanes;
  const int64_t lines = next_panel.lines();
  // A thread takes its next task before it starts on one, to pull it in; so the first are given
  // out: who came first would take two, of two.
  std::atomic<int64_t> next{work.threads};
  parallel_for(work.threads, work.threads, [&](int64_t thread) {
    float* sums = work.scratch.strip(thread, kStripCount);
    for (int64_t task = thread, after = 0; task < tasks; task = after) {
      after = next++;
      const int64_t block = task / lanes, block_after = after / lanes;
      const int64_t row = blocks.row(block), rows = blocks.row(block + 1) - row;
      const int64_t row_after = blocks.row(block_after);
      const Block ahead =
          first_block(work, panel, row_after, blocks.row(block_after + 1) - row_after);
      Prefetch beside(next_panel, lines * task / tasks, lines * (task + 1) / tasks, calls);
      for (int64_t i = task % lanes; i < strips; i += lanes) {
        const Strip s = {row, rows, i * width, std::min(width, panel.n - i * width),
                         i != task % lanes};
        multiply_strip(work, panel, s, ahead, sums, &beside);
        work.done({sums, kStripStride, s.row, panel.n0 + s.col, s.rows, s.cols, panel.k0 == 0});
      }
    }
    work.kernels.release(true);
  });
}

}  // namespace

void tile_gemm(const TileKernels& kernels, const TileProduct& p, int threads, bool in_order,
               const TileDone& done) {
  if (p.m == 0 || p.n == 0) return;
  const std::vector<Panel> panels = panels_of(p);
  Work work = {kernels, p, done, threads, in_order, TileScratch(threads), nullptr};
  uint16_t* kept = p.kept.data;
  int64_t room = kept ? p.kept.count : 0;
  for (size_t i = 0; i < panels.size(); ++i) {
    const int64_t size = packed_count(panels[i]);
    const bool is_kept = size <= room, is_packed = is_kept && p.kept.is_filled;
    Block next = {};
    if (i + 1 < panels.size() && !is_packed) {
      const Panel& n = panels[i + 1];
      next = stored(p.b, n.k0, n.k, n.n0, n.n);
    }
    // the first panel is the largest; a float holds two
    work.packed =
        is_kept ? kept
                : reinterpret_cast<uint16_t*>(work.scratch.panel(packed_count(panels[0]) / 2));
    if (!is_packed) pack_panel(p.b, panels[i], threads, work.packed);
    multiply_panel(work, panels[i], next);
    if (is_kept) kept += size;
    room = is_kept ? room - size : 0;  // what is kept is the first panels
  }
}

int64_t tile_gemm_nbytes(int64_t n, int64_t k, int threads) {
  const int64_t panel = panel_width(n, k, kLongPanel) * round_up(k, kInnerStep) * 2;
  return panel + threads * kStripCount * static_cast<int64_t>(sizeof(float));
}

}  // namespace pyoffline
