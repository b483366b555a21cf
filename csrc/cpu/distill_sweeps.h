// The sweeps over two rows, on Vec: sums of the divergences, then dlogits over the student's row.
//
// Both rows go block by block through buffers in L1 as log-probs and probabilities, so that what
// is compiled for every pair of storage types is the loading only. Sums run in two levels: fp32
// lanes over a block, fp64 across. Absent lanes of the last block are log-prob -inf on both sides,
// which every divergence counts as 0. Included by one file per instruction set, after a vec_*.h.
// Not here: the divergences (divergences.h), anything that is done once a row.
#pragma once

#include "distill_kernels.h"
#include "divergences.h"

namespace pyoffline {
namespace {

// A block of one row: z - m and the derivative of the softcap (untouched where there is none).
struct BlockRow {
  float t[kBlock], damp[kBlock];
};

template <class T, bool kGeneral>
void load_typed(const RowInput& row, float offset, int64_t begin, int64_t count, BlockRow* out) {
  const Source<T, kGeneral> src(row, offset);
  for (int64_t i = 0; i < count; i += kWidth) {
    const int n = static_cast<int>(count - i < kWidth ? count - i : kWidth);
    const F bent = src.bent(n == kWidth ? src.y(begin + i) : src.y(begin + i, n));
    Vec::store(out->t + i, Vec::keep(src.shifted(bent), n, -INFINITY));
    if (kGeneral) Vec::store(out->damp + i, src.damp(bent));
  }
}

// Rows up to a whole vector past `count` are written.
void load_block(const RowInput& row, float offset, int64_t begin, int64_t count, BlockRow* out) {
  with_type(row.type, [&](auto tag) {
    using T = decltype(tag);
    if (is_general(row)) {
      load_typed<T, true>(row, offset, begin, count, out);
    } else {
      load_typed<T, false>(row, offset, begin, count, out);
    }
  });
}

// What turns z - m of a row into its log-prob and probability.
struct Normaliser {
  F log_d, inverse_d, low;
  Normaliser(double d, double log_d_in)
      : log_d(Vec::set(static_cast<float>(log_d_in))),
        inverse_d(Vec::set(static_cast<float>(1.0 / d))),
        low(Vec::set(lowest(log_d_in))) {}
  // p of 2^-100 and less counts as 0: no denormal operand in any product with it.
  static float lowest(double log_d) {
    const float low = static_cast<float>(log_d) - 69.3147f;
    return low > kFarBelow ? low : kFarBelow;
  }
  F p(F t) const { return Vec::mul(exp_above(t, low), inverse_d); }
};

// Both rows, one block at a time.
struct PairBlocks {
  const RowPair& pair;
  Normaliser student, teacher;
  F shift;  // log d of the student - log d of the teacher
  BlockRow s, t;
  float p_s[kBlock], p_t[kBlock];
  int64_t begin = 0, count = 0;

  explicit PairBlocks(const RowPair& in)
      : pair(in),
        student(in.student_d, in.student_log_d),
        teacher(in.teacher_d, in.teacher_log_d),
        shift(Vec::set(static_cast<float>(in.student_log_d - in.teacher_log_d))) {}

  int64_t vocab() const { return pair.student.vocab; }

  void load(int64_t from) {
    begin = from;
    count = vocab() - from < kBlock ? vocab() - from : kBlock;
    load_block(pair.student, pair.student_offset, begin, count, &s);
    load_block(pair.teacher, pair.teacher_offset, begin, count, &t);
    for (int64_t i = 0; i < count; i += kWidth) {
      Vec::store(p_s + i, student.p(Vec::load(s.t + i)));
      Vec::store(p_t + i, teacher.p(Vec::load(t.t + i)));
    }
  }

  PairVec at(int64_t i) const {
    const F ts = Vec::load(s.t + i), tt = Vec::load(t.t + i);
    return {Vec::sub(ts, student.log_d), Vec::sub(tt, teacher.log_d), Vec::load(p_s + i),
            Vec::load(p_t + i), Vec::add(Vec::sub(tt, ts), shift)};
  }
};

struct PairTotals {
  Vec::Sum first, second;
};

void find_peaks(PairBlocks& blocks, const DivergenceTerm* terms, int32_t n, DivergenceSums* out) {
  for (int32_t k = 0; k < n; ++k) {
    out[k].peak = -INFINITY;
    with_divergence(terms[k], [&](auto divergence) {
      if constexpr (decltype(divergence)::kNeedsPeak) {
        F peak = Vec::set(-INFINITY);
        for (int64_t begin = 0; begin < blocks.vocab(); begin += kBlock) {
          blocks.load(begin);
          for (int64_t i = 0; i < blocks.count; i += kWidth) {
            peak = Vec::max(divergence.exponent(blocks.at(i)), peak);
          }
        }
        out[k].peak = Vec::max_lane(peak);
      }
    });
  }
}

void pair_sums(const RowPair& pair, const DivergenceTerm* terms, int32_t n, DivergenceSums* out) {
  PairBlocks blocks(pair);
  find_peaks(blocks, terms, n, out);
  PairTotals totals[kMaxDivergences];
  for (int32_t k = 0; k < n; ++k) totals[k] = {Vec::zero_sum(), Vec::zero_sum()};
  for (int64_t begin = 0; begin < blocks.vocab(); begin += kBlock) {
    blocks.load(begin);
    for (int32_t k = 0; k < n; ++k) {
      with_divergence(terms[k], [&](auto divergence) {
        F first = Vec::set(0.0f), second = first;
        for (int64_t i = 0; i < blocks.count; i += kWidth) {
          divergence.sums(blocks.at(i), out[k].peak, &first, &second);
        }
        Vec::accumulate(totals[k].first, first);
        Vec::accumulate(totals[k].second, second);
      });
    }
  }
  for (int32_t k = 0; k < n; ++k) {
    out[k].first = Vec::total(totals[k].first);
    out[k].second = Vec::total(totals[k].second);
  }
}

// dz of one block, without the softcap's derivative: the objective's (but for the label), plus the
// divergences' own.
void block_dz(const PairBlocks& blocks, const RowGradient* objective,
              const DivergenceGradient* terms, int32_t n, float* dz) {
  const F none = Vec::set(0.0f);
  const RowGradient given = objective ? *objective : RowGradient{0.0f, 0.0f, 0.0f, 0.0f, false};
  const F low = Vec::set(lowest_t(given));
  const F from_p = Vec::set(given.from_p), from_u = Vec::set(-given.from_u);
  const F from_pt = Vec::set(-given.from_pt);
  for (int64_t i = 0; i < blocks.count; i += kWidth) {
    F sum = none;
    if (objective) {
      const F t = Vec::load(blocks.s.t + i), e = exp_above(t, low);
      sum = Vec::fma(from_pt, Vec::max(low, t), from_p);
      sum = Vec::add(Vec::drop_zero(e, Vec::mul(e, sum)), from_u);
    }
    Vec::store(dz + i, sum);
  }
  for (int32_t k = 0; k < n; ++k) {
    const DivergenceTerm term = {terms[k].code, -1, 1.0f, terms[k].param};
    const F factor = Vec::set(terms[k].factor);
    with_divergence(term, [&](auto divergence) {
      for (int64_t i = 0; i < blocks.count; i += kWidth) {
        const F own = Vec::mul(divergence.dz(blocks.at(i), terms[k]), factor);
        Vec::store(dz + i, Vec::add(Vec::load(dz + i), own));
      }
    });
  }
}

template <class Out>
void store_block(const float* dz, int64_t count, Out* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const F x = Vec::load(dz + i);
    if (count - i >= kWidth) {
      Vec::store(out + i, x);
    } else {
      Vec::store(out + i, x, static_cast<int>(count - i));
    }
  }
}

void apply_damp(const BlockRow& row, int64_t count, float* dz) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const F damp = Vec::load(row.damp + i);
    Vec::store(dz + i, Vec::drop_zero(damp, Vec::mul(Vec::load(dz + i), damp)));
  }
}

void pair_gradient(const RowPair& pair, const RowGradient* objective, int64_t label,
                   const DivergenceGradient* terms, int32_t n, DType type, void* out) {
  PairBlocks blocks(pair);
  const bool damped = is_general(pair.student);
  float dz[kBlock], at_label[kBlock];
  float label_value = 0.0f;
  with_type(type, [&](auto tag) {
    using Out = decltype(tag);
    Out* typed = static_cast<Out*>(out);
    for (int64_t begin = 0; begin < blocks.vocab(); begin += kBlock) {
      blocks.load(begin);
      block_dz(blocks, objective, terms, n, dz);
      if (damped) apply_damp(blocks.s, blocks.count, dz);
      if (objective && label >= begin && label < begin + kBlock) {
        // the objective's own value keeps 1 - p_y; the divergences' is the sweep's
        block_dz(blocks, nullptr, terms, n, at_label);
        if (damped) apply_damp(blocks.s, blocks.count, at_label);
        label_value = objective->at_label + at_label[label - begin];
      }
      store_block(dz, blocks.count, typed + begin);
    }
    if (objective) from_float(label_value, typed + label);
  });
}

int64_t argmax(const RowInput& row, float y_max) {
  int64_t found = -1;
  with_type(row.type, [&](auto tag) {
    const Source<decltype(tag), true> src(row, 0.0f);
    const F top = Vec::set(y_max);
    for (int64_t i = 0; i < row.vocab && found < 0; i += kWidth) {
      const int n = static_cast<int>(row.vocab - i < kWidth ? row.vocab - i : kWidth);
      const F y = n == kWidth ? src.y(i) : src.y(i, n);
      if (!Vec::count_zero(Vec::keep(Vec::sub(y, top), n, 1.0f))) continue;
      for (int j = 0; j < n && found < 0; ++j) {
        if (Vec::first(src.y(i + j, 1)) == y_max) found = i + j;
      }
    }
  });
  return found;
}

void gather(const RowInput& row, float offset, const int64_t* ids, int64_t k, float* t,
            float* damp) {
  with_type(row.type, [&](auto tag) {
    const Source<decltype(tag), true> src(row, offset);
    for (int64_t j = 0; j < k; ++j) {
      const F bent = src.bent(src.y(ids[j], 1));
      t[j] = Vec::first(src.shifted(bent));
      damp[j] = Vec::first(src.damp(bent));
    }
  });
}

// Calls fn(begin, end) for blocks of the entries that are not among ids.
template <class Fn>
inline void each_block_apart(int64_t vocab, const int64_t* ids, int64_t k, const Fn& fn) {
  int64_t begin = 0;
  for (int64_t j = 0; j <= k; ++j) {
    const int64_t end = j < k ? ids[j] : vocab;
    for (; begin < end; begin += kBlock) fn(begin, begin + kBlock < end ? begin + kBlock : end);
    begin = end + 1;
  }
}

// Calls fn(y) for the vectors of [begin, end); absent lanes are -inf.
template <class T, class Fn>
inline void each_y(const Source<T, true>& src, int64_t begin, int64_t end, const Fn& fn) {
  for (int64_t i = begin; i < end; i += kWidth) {
    const int n = static_cast<int>(end - i < kWidth ? end - i : kWidth);
    fn(Vec::keep(n == kWidth ? src.y(i) : src.y(i, n), n, -INFINITY), n);
  }
}

ApartSum sum_apart(const RowInput& row, const int64_t* ids, int64_t k) {
  ApartSum out = {0.0f, 0.0};
  with_type(row.type, [&](auto tag) {
    using T = decltype(tag);
    F peak = Vec::set(-INFINITY);
    const Source<T, true> from_zero(row, 0.0f);
    each_block_apart(row.vocab, ids, k, [&](int64_t begin, int64_t end) {
      each_y(from_zero, begin, end, [&](F y, int) { peak = Vec::max(y, peak); });
    });
    const float top = Vec::first(from_zero.bent(Vec::set(Vec::max_lane(peak))));
    if (k == row.vocab || top == -INFINITY) return;
    const Source<T, true> src(row, top);
    const F low = Vec::set(kFarBelow);
    Vec::Sum total = Vec::zero_sum();
    each_block_apart(row.vocab, ids, k, [&](int64_t begin, int64_t end) {
      F part = Vec::set(0.0f);
      each_y(src, begin, end, [&](F y, int n) {
        part = Vec::add(part, Vec::keep(exp_above(src.shifted(src.bent(y)), low), n, 0.0f));
      });
      Vec::accumulate(total, part);
    });
    out = {top, Vec::total(total)};
  });
  return out;
}

}  // namespace
}  // namespace pyoffline
