// Scoring; see score.h.
//
// Against logits in chunks of rows this saves their trip to memory and back, and the library packs
// each panel of the weight once for all rows of a block instead of once per chunk: 319 GFLOP/s at
// 4096 rows, 275 at 1376 (D = 896, Ice Lake, 2026-11-21). A row's sums join in the order of the
// panels, by one thread, so no result depends on the thread count.
#include "score.h"

#include <algorithm>
#include <vector>

#include "panel.h"
#include "parallel.h"
#include "row_driver.h"
#include "row_fold.h"
#include "tile_gemm.h"
#include "vendor_gemm.h"

namespace pyoffline {

namespace {

constexpr int64_t kRowsPerTask = 16;

// Columns [begin, begin + cols) of the rows' logits, before their rounding.
struct Panel {
  const float* sums;
  int64_t stride, begin, cols;
  double sum_u;     // of its class weights
  bool has_weight;  // one of them is not 0
};

Panel describe_panel(const RowArgs& args, const float* sums, int64_t stride, int64_t begin,
                     int64_t cols) {
  Panel panel = {sums, stride, begin, cols, static_cast<double>(cols), true};
  if (!args.class_weight) return panel;
  panel.sum_u = 0.0;
  panel.has_weight = false;
  for (int64_t v = begin; v < begin + cols; ++v) {
    panel.sum_u += args.class_weight[v];
    panel.has_weight |= args.class_weight[v] != 0.0f;
  }
  return panel;
}

// Whether an entry without a maximum (all of them -inf or NaN) is NaN.
bool has_nan(const RowInput& in, const float* row) {
  for (int64_t v = 0; v < in.vocab; ++v) {
    const float x = row[v] + (in.bias ? in.bias[v] : 0.0f);
    if (x != x) return true;
  }
  return false;
}

void fold_row(const Plan& plan, const Panel& panel, int64_t row, const float* source,
              RowFold* fold) {
  const RowArgs& args = plan.args;
  alignas(64) uint16_t rounded[kLogitsPanel];
  RowInput in = describe(args, row);
  in.vocab = panel.cols;
  if (in.bias) in.bias += panel.begin;
  if (in.class_weight) in.class_weight += panel.begin;
  in.logits = source;
  if (in.type != DType::f32) {
    plan.kernels.scale_cast(source, DType::f32, rounded, in.type, panel.cols, 1.0f);
    in.logits = rounded;
  }
  const int64_t label = args.labels[row] - panel.begin;
  const bool has_label = label >= 0 && label < panel.cols;
  RowSums sums;
  plan.kernels.sums(in, has_label ? label : 0, plan.level, &sums);
  if (sums.y_max == -std::numeric_limits<float>::infinity()) {
    fold->add_masked(has_nan(in, source), panel.has_weight, has_label);
  } else {
    fold->add(sums, panel.sum_u, has_label);
  }
}

void write_row(const Plan& plan, int64_t row, const RowFold& fold) {
  const RowArgs& args = plan.args;
  RowStats stats{};
  Coefs coefs{};
  if (is_counted(args, row)) {
    stats = finish_stats(fold.total(), args.vocab, plan.sum_u);
    coefs = evaluate(args, row, stats);
  }
  write_stats(args, row, stats);
  write_coefs(args, row, coefs);
}

// All rows at once: the tile kernel packs each panel of the weight once, and a strip of sums is
// folded where it was made. A row's strips come from left to right (tile_gemm's in_order).
void score_tiles(const TileKernels& kernels, const Matrix& hidden, const Matrix& weight,
                 const Plan& plan) {
  const RowArgs& args = plan.args;
  std::vector<RowFold> folds(args.rows);
  TileProduct product = {hidden.rows,
                         weight.rows,
                         hidden.cols,
                         {hidden.data, hidden.row_stride, false},
                         {weight.data, weight.row_stride, true}};
  product.panel = kShortPanel;
  tile_gemm(kernels, product, args.threads, true, [&](const TileSum& sum) {
    const Panel panel = describe_panel(args, sum.data, sum.stride, sum.col, sum.cols);
    for (int64_t i = 0; i < sum.rows; ++i)
      if (is_counted(args, sum.row + i))
        fold_row(plan, panel, sum.row + i, sum.data + i * sum.stride, &folds[sum.row + i]);
  });
  for (int64_t i = 0; i < args.rows; ++i) write_row(plan, i, folds[i]);
}

}  // namespace

void score_rows(const Matrix& hidden, const Matrix& weight, const RowArgs& args,
                int64_t block_rows) {
  require_vendor_gemm(hidden.type);
  const Plan plan = make_plan(args);
  if (const TileKernels* tiles = tile_kernels_of(hidden.type))
    return score_tiles(*tiles, hidden, weight, plan);
  const int64_t width = std::min(args.vocab, kLogitsPanel), ldc = width + kPad;
  const int64_t height = std::min(args.rows, block_rows);
  PanelBuffer buffer(height * ldc);
  for (int64_t first = 0; first < args.rows; first += height) {
    const int64_t rows = std::min(height, args.rows - first);
    std::vector<RowFold> folds(rows);
    for (int64_t v0 = 0; v0 < args.vocab; v0 += width) {
      const int64_t cols = std::min(width, args.vocab - v0);
      const char* x = static_cast<const char*>(hidden.data);
      const char* w = static_cast<const char*>(weight.data);
      vendor_gemm({hidden.type,
                   rows,
                   cols,
                   hidden.cols,
                   {x + first * hidden.row_stride * size_of(hidden.type), hidden.row_stride, false},
                   {w + v0 * weight.row_stride * size_of(weight.type), weight.row_stride, true},
                   buffer.get(),
                   ldc,
                   0.0f});
      const Panel panel = describe_panel(args, buffer.get(), ldc, v0, cols);
      parallel_for(args.threads, (rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t k) {
        for (int64_t i = k * kRowsPerTask; i < std::min(rows, (k + 1) * kRowsPerTask); ++i)
          if (is_counted(args, first + i))
            fold_row(plan, panel, first + i, panel.sums + i * ldc, &folds[i]);
      });
    }
    for (int64_t i = 0; i < rows; ++i) write_row(plan, first + i, folds[i]);
  }
}

}  // namespace pyoffline
