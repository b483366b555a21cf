// tile_gemm against a plain sum, with a tile kernel in plain C++: packing, tails, strips, order and
// threads, on matrices of the exact size. Values are small integers, so that every sum is exact.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/half_bits.h"
#include "../../csrc/cpu/tile_gemm.h"

namespace tile_case {
namespace {  // half_bits.h keeps its types to each file

using namespace pyoffline;

void plain_tile(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add_c,
                const void* a, const void* b, float* c, bool) {
  const bf16 *left = static_cast<const bf16*>(a), *right = static_cast<const bf16*>(b);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = add_c ? c[i * ldc + j] : 0.0f;
      for (int64_t l = 0; l < k; ++l)
        sum += to_float(left[i * lda + l]) * to_float(right[(l / 2 * ldb + j) * 2 + l % 2]);
      c[i * ldc + j] = sum;
    }
}

struct Stored {
  std::vector<bf16> data;
  int64_t stride;
  bool transposed;
  Operand operand() const { return {data.data(), stride, transposed}; }
  float at(int64_t i, int64_t j) const {
    return to_float(data[transposed ? j * stride + i : i * stride + j]);
  }
};

template <class Rng>
Stored draw(Rng& rng, int64_t rows, int64_t cols) {
  const bool transposed = rng.chance(50);
  if (transposed) std::swap(rows, cols);
  const int64_t stride = cols + rng.below(3);
  // nothing after the last row's last element
  Stored out = {std::vector<bf16>(rows > 0 ? (rows - 1) * stride + cols : 0), stride, transposed};
  for (bf16& x : out.data) from_float(static_cast<float>(rng.below(7) - 3), &x);
  return out;
}

// One product; exits on a wrong or missing element, or one written twice.
inline void multiply(const Stored& a, const Stored& b, int64_t m, int64_t n, int64_t k, int threads,
                     const PackedB& kept, int64_t k_panel, bool in_order) {
  std::vector<float> sums(m * n);
  std::vector<std::atomic<int64_t>> columns(m);  // how far each row has come
  const TileKernels kernels = {plain_tile, [](bool) {}};
  const int64_t parts = k_panel ? (k + 63) / 64 : 1;
  tile_gemm(kernels, {m, n, k, a.operand(), b.operand(), k_panel, kept}, threads, in_order,
            [&](const TileSum& sum) {
              for (int64_t i = 0; i < sum.rows; ++i) {
                const int64_t before = columns[sum.row + i].fetch_add(sum.cols);
                if (in_order && before != sum.col) std::abort();
                for (int64_t j = 0; j < sum.cols; ++j)
                  sums[(sum.row + i) * n + sum.col + j] += sum.data[i * sum.stride + j];
              }
            });
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float want = 0.0f;
      for (int64_t l = 0; l < k; ++l) want += a.at(i, l) * b.at(l, j);
      if (sums[i * n + j] == want && columns[i] == n * std::max<int64_t>(parts, 1)) continue;
      std::printf("FAIL: tile product %ld x %ld x %ld at (%ld, %ld): %g, want %g\n", (long)m,
                  (long)n, (long)k, (long)i, (long)j, sums[i * n + j], want);
      std::exit(1);
    }
}

// A product of random operands, or two that share a packed b as far as there is memory for it.
template <class Rng>
void run(Rng& rng, int64_t m, int64_t n, int64_t k, int threads) {
  const Stored a = draw(rng, m, k), b = draw(rng, k, n);
  const bool in_order = rng.chance(50);
  const int64_t k_panel = !in_order && rng.chance(50) ? 64 : 0;
  std::vector<uint16_t> memory(rng.chance(50) ? rng.below(2 * (n + 64) * (k + 32)) : 0);
  PackedB kept = {memory.empty() ? nullptr : memory.data(), static_cast<int64_t>(memory.size())};
  multiply(a, b, m, n, k, threads, kept, k_panel, in_order);
  kept.is_filled = true;
  if (kept.data) multiply(a, b, m, n, k, threads, kept, k_panel, in_order);
}

// Sizes around the borders of a tile, a block and a strip.
template <class Rng>
int run_all(Rng& rng, int threads) {
  const int64_t sizes[] = {0, 1, 7, 8, 9, 31, 33, 63, 65, 127, 129, 511, 513, 1025};
  int products = 0;
  for (int64_t m : {1, 31, 33, 129, 260})
    for (int i = 0; i < 6; ++i, ++products)
      run(rng, m, sizes[rng.below(14)], sizes[rng.below(14)], threads);
  run(rng, 3, 4200, 40, threads);  // two panels of b
  return products + 1;
}

}  // namespace
}  // namespace tile_case
