// One matrix product by the vendor GEMM inside the installed torch, found at run time.
//
// Looked up by name because torch's wheels export the symbols but no header, and because no build
// may depend on one torch version. Not here: panels and rounding (gemm.cpp).
#pragma once

#include <cstdint>

#include "gemm.h"

namespace pyoffline {

// One operand: rows x cols as stored (row-major), used transposed when `transposed`.
struct Operand {
  const void* data;
  int64_t row_stride;
  bool transposed;
};

// c[m,n] (row-major fp32, row stride ldc) = op(a)[m,k] @ op(b)[k,n] + beta * c. beta 0 never reads
// c.
struct Product {
  DType type;  // of both operands
  int64_t m, n, k;
  Operand a, b;
  float* c;
  int64_t ldc;
  float beta;
};

// Throws std::runtime_error where the symbol of the type is missing, std::invalid_argument where a
// size or a stride does not fit the vendor's 32-bit integers.
void vendor_gemm(const Product& product);

// oneDNN's tile kernel for bf16, which tile_gemm.h drives; null where the CPU multiplies no bf16,
// libtorch does not export it, or it does not compute what it should (asked once).
struct TileKernels;
const TileKernels* tile_kernels();

// The same for operands of a type: null for all but bf16, and where GEMMs are switched off.
const TileKernels* tile_kernels_of(DType type);

// A symbol of the loaded libtorch_cpu.so (or of the process), or null.
void* torch_symbol(const char* name);

// Throws as vendor_gemm would for a missing symbol, before any output is touched.
void require_vendor_gemm(DType type);

}  // namespace pyoffline
