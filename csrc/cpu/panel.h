// The strips of V that products work in: their widths, and their fp32 scratch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "scratch.h"

namespace pyoffline {

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
// Rows up to which logits on the tile kernel are multiplied turned round, so that no weight is
// packed. Time over that of the packed weight, D = 896, V = 151936, Zen 4 (2026-11-28), alone |
// beside busy neighbours: 1 row 0.65, 64 0.85, 342 0.957|0.897, 410 0.962|0.948, 1024 0.982|0.975,
// 1376 0.993|0.992, 4096 1.07.
constexpr int64_t kTurnedRows = 1536;
// Rows of V that one product of dhidden on the tile kernel takes (tile_gemm.h).
constexpr int64_t kTileDHiddenPanel = 4096;

// fp32 scratch of one call.
class PanelBuffer {
 public:
  explicit PanelBuffer(int64_t count) : scratch_(static_cast<size_t>(count) * sizeof(float)) {}
  float* get() const { return static_cast<float*>(scratch_.get()); }

 private:
  Scratch scratch_;
};

}  // namespace pyoffline
