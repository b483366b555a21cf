// The vector half of the row pass, on Vec: the maximum, the sums of exponentials, the gradient. One
// row a call.
//
// A bf16 row of 151936 logits is 300 KB and stays in L2, so the three sweeps read it from memory
// once; while the second and third compute, the next row is pulled into L2. Sums run in two levels:
// fp32 lanes over a block of 16 vectors, fp64 across blocks, so an error does not grow with V. The
// block that holds the maximum counts its ones apart from the rest (row_pass.h). Included by one
// file per instruction set, after a vec_*.h. Not here: anything that is done once a row.
#pragma once

#include <float.h>
#include <math.h>

#include "../row_pass.h"
#include "kernels.h"
#include "vec_math.h"

namespace pyoffline {
namespace {

using F = Vec::F;
constexpr int64_t kWidth = Vec::width;
constexpr int64_t kBlock = 16 * kWidth;

// Calls fn with a value of the storage type.
template <class Fn>
inline void with_type(DType type, const Fn& fn) {
  if (type == DType::bf16) {
    fn(bf16{});
  } else if (type == DType::f16) {
    fn(f16{});
  } else {
    fn(0.0f);
  }
}

// Elements [begin, end) of a row of T at `next`, into L2.
template <class T>
inline void prefetch(const void* next, int64_t begin, int64_t end) {
  const char* bytes = static_cast<const char*>(next);
  for (int64_t i = begin * sizeof(T); i < end * static_cast<int64_t>(sizeof(T)); i += 64) {
    __builtin_prefetch(bytes + i, 0, 2);
  }
}

// The logits of one row as y and t = z - m (kernels.h). kGeneral: a bias, a sign or a softcap; else
// y is the logit.
template <class T, bool kGeneral>
struct Source {
  const RowInput& row;
  const T* logits;
  F offset, slope;

  Source(const RowInput& in, float offset_in)
      : row(in),
        logits(static_cast<const T*>(in.logits)),
        offset(Vec::set(offset_in)),
        slope(Vec::set(in.slope)) {}

  F ordered(F x, F bias) const { return Vec::mul(Vec::set(row.sign), Vec::add(x, bias)); }
  F y(int64_t i) const {
    const F x = Vec::load(logits + i);
    if (!kGeneral) return x;
    return ordered(x, row.bias ? Vec::load(row.bias + i) : Vec::set(0.0f));
  }
  F y(int64_t i, int n) const {
    const F x = Vec::load(logits + i, n);
    if (!kGeneral) return x;
    return ordered(x, row.bias ? Vec::load(row.bias + i, n) : Vec::set(0.0f));
  }
  // In place of y under a softcap: tanh(inner y).
  F bent(F y) const {
    if (!kGeneral || row.inner == 0.0f) return y;
    return vec_tanh(Vec::mul(Vec::set(row.inner), y));
  }
  F shifted(F bent_y) const { return Vec::mul(slope, Vec::sub(bent_y, offset)); }
  // 1 - tanh^2, the derivative of the softcap.
  F damp(F bent_y) const {
    const F one = Vec::set(1.0f);
    if (!kGeneral || row.inner == 0.0f) return one;
    return Vec::fma(Vec::sub(Vec::set(0.0f), bent_y), bent_y, one);
  }
};

struct Peak {
  float y;
  int64_t block;  // the first block that holds it
};

// A NaN is passed over here (Vec::max returns its second argument); exp carries it into the sums.
template <class T, bool kGeneral>
Peak find_max(const Source<T, kGeneral>& src, int64_t vocab) {
  const F lowest = Vec::set(-INFINITY);
  Peak peak = {-INFINITY, 0};
  F best = lowest;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    F max0 = lowest, max1 = lowest;
    int64_t i = begin;
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
      max0 = Vec::max(src.y(i), max0);
      max1 = Vec::max(src.y(i + kWidth), max1);
    }
    for (; i < end; i += kWidth) {
      const int n = static_cast<int>(end - i < kWidth ? end - i : kWidth);
      max0 = Vec::max(Vec::keep(src.y(i, n), n, -INFINITY), max0);
    }
    max0 = Vec::max(max0, max1);
    if (Vec::any_greater(max0, best)) {
      peak = {Vec::max_lane(max0), begin / kBlock};
      best = Vec::set(peak.y);
    }
  }
  return peak;
}

// Entries this far below the maximum count as 0: exp would be denormal, and a denormal operand or
// result costs a microcode assist of about 150 cycles, ten times the rest of the sweep where logits
// spread widely. Over 262,147 entries that is 3e-33 of d, which is at least 1.
constexpr float kFarBelow = -87.3365f;  // log FLT_MIN
// Where sums of squares start (and what is taken off at the end), to keep them normal numbers.
constexpr float kSquaresFloor = 0x1p-100f;

// exp(t), exactly 0 for t <= low (also -inf), NaN for NaN. low >= kFarBelow.
inline F exp_above(F t, F low) { return Vec::keep_above(t, low, exp_clamped(Vec::max(low, t))); }

struct Totals {
  Vec::Sum tail, s, squares, ut;
  int64_t ones;
};

// One block's partial sums, in two sets of lanes. kLevel: see RowSums. kPeak: count entries at the
// maximum apart.
template <int kLevel, bool kPeak>
struct BlockSums {
  F tail[2], s[2], squares[2], ut[2];
  int64_t ones = 0;

  BlockSums() {
    const F zero = Vec::set(0.0f);
    for (int j = 0; j < 2; ++j) tail[j] = s[j] = ut[j] = zero;
    for (int j = 0; j < 2; ++j) squares[j] = Vec::set(kSquaresFloor);
  }

  inline __attribute__((always_inline)) void step(int j, F t, F u) {
    const F low = Vec::set(kFarBelow);
    // finite, so that a masked entry adds 0 * -87 and not 0 * -inf
    const F clamped = Vec::min(Vec::set(89.0f), Vec::max(low, t));
    F e = Vec::keep_above(t, low, exp_clamped(clamped));
    if (kLevel >= 1) s[j] = Vec::fma(e, clamped, s[j]);
    if (kLevel >= 2) ut[j] = Vec::add(ut[j], Vec::drop_zero(u, Vec::mul(u, t)));
    if (kPeak) {
      ones += Vec::count_zero(t);
      e = Vec::drop_zero(t, e);
    }
    tail[j] = Vec::add(tail[j], e);
    if (kLevel >= 1) squares[j] = Vec::fma(e, e, squares[j]);
  }

  void flush(Totals* out) const {
    Vec::accumulate(out->tail, Vec::add(tail[0], tail[1]));
    if (kLevel >= 1) {
      Vec::accumulate(out->s, Vec::add(s[0], s[1]));
      const F both = Vec::add(squares[0], squares[1]);
      Vec::accumulate(out->squares, Vec::sub(both, Vec::set(2.0f * kSquaresFloor)));
    }
    if (kLevel >= 2) Vec::accumulate(out->ut, Vec::add(ut[0], ut[1]));
    out->ones += ones;
  }
};

template <int kLevel, bool kPeak, class T, bool kGeneral>
inline __attribute__((always_inline)) void sum_block(const Source<T, kGeneral>& src, int64_t begin,
                                                     int64_t end, Totals* totals) {
  BlockSums<kLevel, kPeak> sums;
  const float* weight = kLevel >= 2 ? src.row.class_weight : nullptr;
  const F one = Vec::set(1.0f);
  int64_t i = begin;
  for (; i + 2 * kWidth <= end; i += 2 * kWidth) {
    sums.step(0, src.shifted(src.bent(src.y(i))), weight ? Vec::load(weight + i) : one);
    const int64_t k = i + kWidth;
    sums.step(1, src.shifted(src.bent(src.y(k))), weight ? Vec::load(weight + k) : one);
  }
  for (; i < end; i += kWidth) {
    const int n = static_cast<int>(end - i < kWidth ? end - i : kWidth);
    const F t = Vec::keep(src.shifted(src.bent(src.y(i, n))), n, -INFINITY);
    sums.step(0, t, weight ? Vec::load(weight + i, n) : Vec::keep(one, n, 0.0f));
  }
  sums.flush(totals);
}

template <int kLevel, class T, bool kGeneral>
void sum_row(const RowInput& row, int64_t label, RowSums* out) {
  const Peak peak = find_max(Source<T, kGeneral>(row, 0.0f), row.vocab);
  out->y_max = peak.y;
  out->offset = Vec::first(Source<T, kGeneral>(row, 0.0f).bent(Vec::set(peak.y)));
  out->m = static_cast<double>(row.slope) * static_cast<double>(out->offset);
  const Source<T, kGeneral> src(row, out->offset);
  const F label_y = src.bent(src.y(label, 1));
  out->t_label = Vec::first(src.shifted(label_y));
  out->damp_label = Vec::first(src.damp(label_y));
  Totals totals = {Vec::zero_sum(), Vec::zero_sum(), Vec::zero_sum(), Vec::zero_sum(), 0};
  for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < row.vocab ? begin + kBlock : row.vocab;
    if (row.next) prefetch<T>(row.next, begin, end);
    if (begin == peak.block * kBlock) {
      sum_block<kLevel, true>(src, begin, end, &totals);
    } else {
      sum_block<kLevel, false>(src, begin, end, &totals);
    }
  }
  out->ones = static_cast<double>(totals.ones);
  out->tail = Vec::total(totals.tail);
  out->s = Vec::total(totals.s);
  out->tail_squares = Vec::total(totals.squares);
  out->sum_ut = Vec::total(totals.ut);
}

inline bool is_general(const RowInput& row) {
  return row.bias || row.sign != 1.0f || row.inner != 0.0f;
}

template <class T, bool kGeneral>
void sum_row_at(const RowInput& row, int64_t label, int level, RowSums* out) {
  if (level == 0) {
    sum_row<0, T, kGeneral>(row, label, out);
  } else if (level == 1) {
    sum_row<1, T, kGeneral>(row, label, out);
  } else {
    sum_row<2, T, kGeneral>(row, label, out);
  }
}

void sums(const RowInput& row, int64_t label, int level, RowSums* out) {
  with_type(row.type, [&](auto tag) {
    using T = decltype(tag);
    if (is_general(row)) {
      sum_row_at<T, true>(row, label, level, out);
    } else {
      sum_row_at<T, false>(row, label, level, out);
    }
  });
}

// Below this t the product of e and the row's constants is denormal: it counts as 0, for the price
// of an assist.
inline float lowest_t(const RowGradient& constants) {
  const float from_p = fabsf(constants.from_p), from_pt = fabsf(constants.from_pt);
  const float low = logf(FLT_MIN / (from_p > from_pt ? from_p : from_pt));
  return low > kFarBelow ? low : kFarBelow;
}

// Every coefficient finite, only p to scale: dlogits_v = from_p e_v. An e_v of 0 gives 0 by itself.
template <class T, class Out>
void simple_gradient(const RowInput& row, const RowSums& sums, const RowGradient& constants,
                     Out* out) {
  const Source<T, false> src(row, sums.offset);
  const F from_p = Vec::set(constants.from_p), low = Vec::set(lowest_t(constants));
  auto value = [&](F x) { return Vec::mul(exp_above(src.shifted(x), low), from_p); };
  for (int64_t begin = 0; begin < row.vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < row.vocab ? begin + kBlock : row.vocab;
    int64_t i = begin;
    for (; i + kWidth <= end; i += kWidth) {
      Vec::store_number(out + i, value(src.y(i)));
    }
    const int n = static_cast<int>(end - i);
    if (n) Vec::store(out + i, value(src.y(i, n)), n);
  }
}

// Any coefficients. Products with p_v are 0 by selection where p_v is 0, so an infinite coefficient
// cannot make a NaN.
template <class T, class Out>
void full_gradient(const RowInput& row, const RowSums& sums, const RowGradient& constants,
                   Out* out) {
  const Source<T, true> src(row, sums.offset);
  const F from_p = Vec::set(constants.from_p), from_pt = Vec::set(-constants.from_pt);
  const F from_u = Vec::set(-constants.from_u);
  const F low = Vec::set(lowest_t(constants));
  const bool has_pt = constants.from_pt != 0.0f, has_u = constants.from_u != 0.0f;
  auto value = [&](F x, F u) {
    const F bent = src.bent(x), t = src.shifted(bent), e = exp_above(t, low);
    F dz = has_pt ? Vec::fma(from_pt, Vec::max(low, t), from_p) : from_p;
    dz = Vec::drop_zero(e, Vec::mul(e, dz));
    if (has_u) dz = Vec::add(dz, Vec::drop_zero(u, Vec::mul(from_u, u)));
    const F damp = src.damp(bent);
    return Vec::drop_zero(damp, Vec::mul(dz, damp));
  };
  const float* weight = has_u ? row.class_weight : nullptr;
  const F one = Vec::set(1.0f);
  int64_t i = 0;
  for (; i + kWidth <= row.vocab; i += kWidth) {
    Vec::store(out + i, value(src.y(i), weight ? Vec::load(weight + i) : one));
  }
  const int n = static_cast<int>(row.vocab - i);
  if (n) Vec::store(out + i, value(src.y(i, n), weight ? Vec::load(weight + i, n) : one), n);
}

void gradient(const RowInput& row, const RowSums& sums, const RowGradient& constants, int64_t label,
              DType type, void* out) {
  const bool finite = constants.from_p - constants.from_p == 0.0f;
  const bool simple =
      finite && constants.from_pt == 0.0f && constants.from_u == 0.0f && !is_general(row);
  with_type(type, [&](auto out_tag) {
    using Out = decltype(out_tag);
    Out* typed = static_cast<Out*>(out);
    with_type(row.type, [&](auto tag) {
      using T = decltype(tag);
      if (simple) {
        simple_gradient<T>(row, sums, constants, typed);
      } else {
        full_gradient<T>(row, sums, constants, typed);
      }
    });
    from_float(constants.at_label, typed + label);
  });
}

}  // namespace
}  // namespace pyoffline
