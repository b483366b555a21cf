// Rows of logits and dlogits in memory, for the drivers whose logits are stored: where a row lies,
// and rows that are written without a sweep.
//
// Compiled for the baseline CPU only. Not here: what every driver shares (row_driver.h).
#pragma once

#include <cstring>

#include "half_bits.h"
#include "row_driver.h"

namespace pyoffline {
namespace {

inline const char* logits_row(const RowArgs& args, int64_t row) {
  return static_cast<const char*>(args.logits) +
         row * args.logits_stride * size_of(args.logits_type);
}

inline char* dlogits_row(const RowArgs& args, int64_t row) {
  return static_cast<char*>(args.dlogits) + row * args.dlogits_stride * size_of(args.dlogits_type);
}

// The row, and the one after it where that is in this run and counts: to be pulled into L2.
inline RowInput describe_stored(const RowArgs& args, int64_t row, int64_t run_end) {
  RowInput in = describe(args, row);
  in.logits = logits_row(args, row);
  if (row + 1 < run_end && is_counted(args, row + 1)) in.next = logits_row(args, row + 1);
  return in;
}

inline void zero_dlogits(const RowArgs& args, int64_t row) {
  if (args.dlogits) std::memset(dlogits_row(args, row), 0, args.vocab * size_of(args.dlogits_type));
}

inline void nan_dlogits(const RowArgs& args, int64_t row) {
  char* out = dlogits_row(args, row);
  for (int64_t v = 0; v < args.vocab; ++v) {
    if (args.dlogits_type == DType::f32) from_float(kNan, reinterpret_cast<float*>(out) + v);
    if (args.dlogits_type == DType::bf16) from_float(kNan, reinterpret_cast<bf16*>(out) + v);
    if (args.dlogits_type == DType::f16) from_float(kNan, reinterpret_cast<f16*>(out) + v);
  }
}

inline Coefs given_coefs(const RowArgs& args, int64_t row) {
  const float* c = args.coefs + row;
  return {0.0f, c[0], c[args.rows], c[2 * args.rows], c[3 * args.rows]};
}

inline bool all_zero(const Coefs& c) { return c.a == 0 && c.b == 0 && c.c == 0 && c.e == 0; }

}  // namespace
}  // namespace pyoffline
