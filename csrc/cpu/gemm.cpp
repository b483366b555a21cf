// Panels around the vendor GEMM; see gemm.h.
//
// A panel is a strip of V whose fp32 result is rounded while it is still in cache, so the [C,V] or
// [V,D] fp32 matrix never exists. The inner size of dhidden is split too: the vendor's blocking
// loses at V = 150,000.
#include "gemm.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>

#include "dispatch.h"
#include "vendor_gemm.h"

namespace pyoffline {

namespace {

// Panel widths, measured on an Ice Lake Xeon (2 cores, no AMX or avx512_bf16) with libtorch 2.13's
// MKL, 2026-11-21, GFLOP/s best of 4 at (C,D,V) = (1024, 896, 151936) | best of 3 at (2048, 2048,
// 32000):
//   dhidden   1024: 266|297   2048: 268|294   4096: 263|289   8192: 269|300   16384: 266|287
//   dweight    512: 246|261   1024: 260|276   2048: 247|279   4096: 258|293
// logits with their rounding, time over one whole product into fp32 (median of 6), at (2048, 2048,
// 32000) | (1376, 896, 75968):
//   1024: 1.25|1.05   2048: 1.09|1.05   4096: 1.02|1.03   8192: 1.22|0.99
// Speed does not depend on the dhidden panel, memory does: MKL keeps fp32 copies of its operands,
// about 8 * C * width bytes, and never frees them (131 MiB at C = 1024, width = 16384).
constexpr int64_t kLogitsPanel = 4096;
constexpr int64_t kDHiddenPanel = 2048;
constexpr int64_t kDWeightPanel = 2048;
constexpr int64_t kPad = 16;

int64_t item_size(DType type) { return type == DType::f32 ? 4 : 2; }

void* at(const Matrix& x, int64_t row, int64_t col) {
  return static_cast<char*>(x.data) + (row * x.row_stride + col) * item_size(x.type);
}

// fp32 scratch that lives for one call. No huge pages: where memory is fragmented their first touch
// stalls on compaction (0.4 s for 272 MiB, against 0.05 s in small pages, 2026-11-21).
class PanelBuffer {
 public:
  explicit PanelBuffer(int64_t count) : nbytes_(std::max<int64_t>(count, 1) * sizeof(float)) {
    data_ = mmap(nullptr, nbytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  ~PanelBuffer() { munmap(data_, nbytes_); }
  PanelBuffer(const PanelBuffer&) = delete;
  PanelBuffer& operator=(const PanelBuffer&) = delete;
  float* get() const { return static_cast<float*>(data_); }

 private:
  size_t nbytes_;
  void* data_;
};

}  // namespace

void gemm_logits(const Matrix& hidden, const Matrix& weight, const Matrix& out, int threads) {
  require_vendor_gemm(hidden.type);
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

void gemm_dhidden(const Matrix& dlogits, const Matrix& weight, const Matrix& out) {
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
