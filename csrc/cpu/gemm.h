// The three products of a linear loss head, on the vendor GEMM that the installed torch carries.
//
// The x86 wheels of torch export MKL's bf16 and fp16 GEMMs with fp32 accumulation and oneDNN's bf16
// tile kernel. A CPU that multiplies bf16 (avx512_bf16, AMX) takes the tile kernel (465 GFLOP/s on
// two Zen 4 cores, of which the products here reach 400 to 430; MKL 160, torch.mm 390, 2026-11-28);
// another takes MKL (250 to 320 on two Ice Lake cores, torch.mm 65). They are looked up at run
// time; where they are missing these functions throw and the Python side falls back to torch's own
// products. Fused here: the rounding (and scaling) of a panel or strip while it is in cache. Not
// here: chunks over rows, argument checks.
#pragma once

#include <cstdint>
#include <string>

#include "../row_args.h"

namespace pyoffline {

// A row-major matrix with unit column stride, row_stride >= cols (in elements).
struct Matrix {
  void* data;
  DType type;
  int64_t rows;
  int64_t cols;
  int64_t row_stride;
};

struct GemmInfo {
  bool bf16;
  bool f16;
  bool f32;
  bool tiles;           // bf16 products run on oneDNN's tile kernel (tile_gemm.h), not on MKL
  std::string library;  // path of the library that has the symbols
  std::string missing;  // why not, when any of the three is false
};

GemmInfo gemm_info();

// Tests: pretend that no symbol was found; that the tile kernel was not.
void set_gemm(bool enabled);
void set_tile_gemm(bool enabled);

// out[C,V] = hidden[C,D] @ weight[V,D]^T: fp32 accumulation, one rounding to out's type.
void gemm_logits(const Matrix& hidden, const Matrix& weight, const Matrix& out, int threads);

// Memory in which a product leaves its packed second operand, or as much of it as fits, to those
// that share it; only the tile kernel packs.
struct PackedB {
  uint16_t* data = nullptr;
  int64_t count = 0;       // elements
  bool is_filled = false;  // by a product of the same operand
};

// out[C,D] fp32 = dlogits[C,V] @ weight[V,D].
void gemm_dhidden(const Matrix& dlogits, const Matrix& weight, const Matrix& out, int threads,
                  const PackedB& kept = {});

// acc[V,D] fp32 = dlogits[C,V]^T @ hidden[C,D] + beta * acc, then out = cast(out_scale * acc).
// Either of acc and out may have null data; without acc, beta must be 0 and no [V,D] fp32 buffer is
// made.
struct DWeight {
  Matrix acc;
  float beta;
  Matrix out;
  float out_scale;
};
void gemm_dweight(const Matrix& dlogits, const Matrix& hidden, const DWeight& dweight, int threads);

}  // namespace pyoffline
