// A bf16 product on a vendor's tile kernel (oneDNN's brgemm, as libtorch exports it).
//
// The kernel multiplies one packed tile; packing, blocking and threads are here, and each finished
// strip of the result is handed to the caller while it is in the core's cache: to be rounded, added
// or folded there, so that no fp32 panel is stored. A sum's order depends on k alone: no result
// depends on the thread count, the row's place or how many rows there are. Not here: where the
// kernel comes from (tile_kernel.cpp).
#pragma once

#include <cstdint>
#include <functional>

#include "vendor_gemm.h"

namespace pyoffline {

// c[m,n] (+)= a[m,k] @ b[k,n], b in pairs of rows: b[k/2][n][2] (VNNI). Strides in elements of
// [m,k], of a row of n, of [m,n].
using TileKernel = void (*)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                            bool add_c, const void* a, const void* b, float* c, bool is_vnni);
// Gives back what the kernel holds of a thread (the AMX tile configuration).
using TileRelease = void (*)(bool is_vnni);

struct TileKernels {
  TileKernel multiply = nullptr;
  TileRelease release = nullptr;
};

// Elements of b that are packed at a time: what the threads share, in L3, or in their L2 caches.
// Stored results want long runs (logits of 4096 rows by short panels: 1.05); where strips are
// folded, short panels won (scoring 1024, 4096 rows, and 2048 of D = 2048: 0.94, 0.97, 0.93;
// Zen 4, 2026-11-28).
constexpr int64_t kLongPanel = 4 << 20, kShortPanel = 1 << 20;

// op(a)[m,k] @ op(b)[k,n], both bf16. k_panel: how much of k is summed before a strip is handed
// out; 0: all of it. kept: where b stays packed for the products after this one.
struct TileProduct {
  int64_t m, n, k;
  Operand a, b;
  int64_t k_panel = 0;
  PackedB kept = {};
  int64_t panel = kLongPanel;
};

// A strip has at most so many rows.
constexpr int64_t kTileRows = 64;

// Rows [row, row + rows) and columns [col, col + cols) of the result, or of one k_panel's part of
// it: the parts of an element come in order. What lies beyond, up to whole 16 rows and columns, may
// be read too.
struct TileSum {
  const float* data;
  int64_t stride, row, col, rows, cols;
  bool is_first;
};
using TileDone = std::function<void(const TileSum& sum)>;

// Calls `done` for every strip of the result, from several threads. in_order: the strips of a row
// come from left to right, one after the other. k = 0 gives strips of zeros.
void tile_gemm(const TileKernels& kernels, const TileProduct& product, int threads, bool in_order,
               const TileDone& done);

// Scratch of one product, at most.
int64_t tile_gemm_nbytes(int64_t n, int64_t k, int threads);

}  // namespace pyoffline
