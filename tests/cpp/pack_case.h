// The packers of tile_pack.h, with and without AVX-512, element by element against their
// definition: blocks of the exact size, nothing written beyond the padded one.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cpu/tile_pack.h"

namespace pack_case {

using namespace pyoffline;

struct Source {
  int64_t rows, cols, stride;
  std::vector<uint16_t> data;
  Bits bits() const { return {data.data(), stride}; }
  uint16_t at(int64_t i, int64_t j) const {
    return i < rows && j < cols ? data[i * stride + j] : 0;
  }
};

inline Source numbered(int64_t rows, int64_t cols) {
  const int64_t stride = cols + 3;
  Source x = {rows, cols, stride, std::vector<uint16_t>(rows > 0 ? (rows - 1) * stride + cols : 0)};
  for (size_t i = 0; i < x.data.size(); ++i) x.data[i] = static_cast<uint16_t>(40503 * i + 1);
  return x;
}

// pack(out) fills out[size]; want(i) is its element i. Exits where they differ.
template <class Pack, class Want>
void expect(const char* name, const Source& x, int64_t size, const Pack& pack, const Want& want) {
  constexpr uint16_t kUntouched = 0xdead;
  std::vector<uint16_t> out(size + 32, kUntouched);
  pack(out.data());
  for (int64_t i = 0; i < size + 32; ++i) {
    const uint16_t wanted = i < size ? want(i) : kUntouched;
    if (out[i] == wanted) continue;
    std::printf("FAIL: %s of %ld x %ld, element %ld: %d, want %d\n", name, (long)x.rows,
                (long)x.cols, (long)i, out[i], wanted);
    std::exit(1);
  }
}

inline void run(int64_t rows, int64_t cols) {
  const Source x = numbered(rows, cols);
  int64_t width = cols + 2, deep = rows + 3;
  expect(
      "pack_copy", x, deep * width,
      [&](uint16_t* out) { pack_copy(x.bits(), rows, cols, deep, width, out); },
      [&](int64_t i) { return x.at(i / width, i % width); });
  width = rows + 6, deep = cols + 3;
  expect(
      "pack_transpose", x, deep * width,
      [&](uint16_t* out) { pack_transpose(x.bits(), rows, cols, deep, width, out); },
      [&](int64_t i) { return x.at(i % width, i / width); });
  width = cols + 4, deep = (rows + 3) / 2 * 2;
  const auto pairs = [&](int64_t i) { return i / (2 * width) * 2 + i % 2; };
  const auto place = [&](int64_t i) { return i % (2 * width) / 2; };
  expect(
      "pack_pairs", x, deep * width,
      [&](uint16_t* out) { pack_pairs(x.bits(), rows, cols, deep, width, out); },
      [&](int64_t i) { return x.at(pairs(i), place(i)); });
  width = rows + 4, deep = (cols + 3) / 2 * 2;
  expect(
      "pack_pairs_transposed", x, deep * width,
      [&](uint16_t* out) { pack_pairs_transposed(x.bits(), cols, rows, deep, width, out); },
      [&](int64_t i) { return x.at(place(i), pairs(i)); });
}

inline void run_square() {
  std::vector<float> x(15 * 19 + 16), out(15 * 18 + 16 + 1, -1.0f);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i);
  transpose_16x16(x.data(), 19, out.data(), 18);
  for (int64_t i = 0; i < 16; ++i)
    for (int64_t j = 0; j < 18; ++j) {
      const size_t at = i * 18 + j;
      if (at >= out.size() || out[at] == (j < 16 ? x[j * 19 + i] : -1.0f)) continue;
      std::printf("FAIL: transpose_16x16, element (%ld, %ld)\n", (long)i, (long)j);
      std::exit(1);
    }
}

// Around the borders of 4, 8, 16 and 32; returns how many blocks.
inline int run_all() {
  run_square();
  const int64_t sizes[] = {0, 1, 7, 8, 15, 16, 31, 32, 33, 39, 63, 64, 65, 100};
  int blocks = 0;
  for (int64_t rows : sizes)
    for (int64_t cols : sizes) run(rows, cols), ++blocks;
  return blocks;
}

}  // namespace pack_case
