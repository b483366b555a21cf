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
#include <memory>
#include <vector>

#include "panel.h"
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

// op(a)[m,k] @ op(b)[k,n], both bf16.
struct TileProduct {
  int64_t m, n, k;
  Operand a, b;
};

// Rows [row, row + rows) and columns [col, col + cols) of the result.
struct TileSum {
  const float* data;
  int64_t stride, row, col, rows, cols;
};
using TileDone = std::function<void(const TileSum& sum)>;

// What products of one loop share, so that its pages are touched once.
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

// Calls `done` for every strip of the result, from several threads. in_order: the strips of a row
// come from left to right, one after the other. k = 0 gives strips of zeros.
void tile_gemm(const TileKernels& kernels, const TileProduct& product, int threads, bool in_order,
               TileScratch* scratch, const TileDone& done);

// Scratch of one product, at most.
int64_t tile_gemm_nbytes(int64_t n, int64_t k, int threads);

}  // namespace pyoffline
