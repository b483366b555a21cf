// The row pass of one row by a group of threads: maximum, sums, objective, gradient.
//
// The row is cut into packets of 16 bytes, block b of the group takes an equal run of them and
// deals them out to its threads (row_slots.h). A thread copies its packets to the block's memory,
// sweeps them there three times (maximum, sums, gradient) and writes the gradient's packets where
// they belong: each logit is read from global memory once. What does not fit (row_plan.h) is read
// again by each sweep, from L2 if it is still there. Sums: 16 elements in fp32, compensated over a
// thread's share, fp64 from there on, always in the same order. Between the sweeps one warp of each
// block runs the fp64 scalar half of row_pass.h. Not here: threads and memory (row_group.h),
// launches.
#pragma once

#include "row_sums.h"

namespace pyoffline {
namespace gpu {

constexpr double kLn2 = 0.6931471805599453;

template <class T, class Out, class Group>
class RowAlgorithm : private RowSweeps<T, Group> {
 public:
  static_assert(sizeof(Out) <= sizeof(T), "a wider dlogits row would overwrite logits in place");

  PYOFFLINE_HD RowAlgorithm(Group& group, const RowTask& task, int64_t row)
      : Base(group, task, row) {}

  PYOFFLINE_HD void run() {
    const int64_t label = args_.labels[row_];
    const float weight = args_.weights ? args_.weights[row_] : 1.0f;
    if (label == args_.ignore_index || weight == 0.0f) return fill_row(0.0f, RowStats{}, Coefs{});
    if (label < 0 || label >= args_.vocab) return mark_bad_label(label);
    const Coefs coefs = given_coefs();
    if (args_.coefs && is_zero(coefs) && !task_.writes_stats)
      return fill_row(0.0f, RowStats{}, Coefs{});
    const bool wants_gap = task_.wants_gap || coefs.e != 0.0f;
    describe();
    bool is_general = args_.bias || transform_.sign < 0.0f || transform_.inner != 0.0f || wants_gap;
    const T* const source = cut_row();
    if (g_.thread() == 0) {
      keep_scalars(weight, coefs);
      keep_place();
      g_.shared().wants_gap = wants_gap;
    }
    if (is_general) {
      this->template find_max<true>(source);
    } else {
      this->template find_max<false>(source);
    }
    is_general = is_general || !this->is_plain();
    if (g_.thread() == 0) g_.shared().is_general = is_general;
    if (is_general) {
      this->template sum_row<true>();
    } else {
      this->template sum_row<false>();
    }
    g_.sync();
    if (warp() == 0 && (g_.block() == 0 || args_.dlogits)) finish();
    g_.arrive();
    if (args_.dlogits) {
      g_.block_sync();
      write_gradient();
    }
    g_.wait();  // a block's slots live until every peer has read them
  }

 private:
  using Base = RowSweeps<T, Group>;
  using Base::add_lanes, Base::begin, Base::class_weight, Base::cut_row, Base::describe,
      Base::first_slot, Base::head, Base::keep_sums, Base::label, Base::lane, Base::logits,
      Base::next, Base::ordered, Base::residual, Base::settle, Base::shift_step, Base::slope,
      Base::span, Base::step, Base::temperature, Base::thread_of, Base::warp;
  using Base::args_, Base::g_, Base::held_, Base::kEdges, Base::kEnd, Base::kLanes, Base::kPackets,
      Base::kPer, Base::offset_, Base::row_, Base::task_, Base::transform_, Base::whole;

  // ---- per-row scalars ------------------------------------------------------------------------
  PYOFFLINE_HD static bool is_zero(const Coefs& c) {
    return c.a == 0.0f && c.b == 0.0f && c.c == 0.0f && c.e == 0.0f;
  }

  PYOFFLINE_HD Coefs given_coefs() const {
    if (!args_.coefs) return Coefs{};
    const float* c = args_.coefs + row_;
    const int64_t n = args_.rows;
    return {0.0f, c[0], c[n], c[2 * n], c[3 * n]};
  }

  // Before the first sync: the loads are over when the scalar half needs them, and later another
  // block may have overwritten the label's logit.
  PYOFFLINE_HD void keep_scalars(float weight, const Coefs& coefs) const {
    auto at = [this](const float* x) { return x ? x[row_] : NAN; };
    RowScalars& keep = g_.shared().scalars;
    keep.token = {NAN,           NAN,          NAN,           NAN,
                  at(args_.old), at(args_.mu), at(args_.ref), args_.adv ? args_.adv[row_] : 1.0f};
    keep.coefs = coefs;
    keep.weight = weight;
    keep.temperature = temperature();
    keep.label_y = ordered(widen(logits()[label()]), label());
  }

  // The scalar half, by the block's first warp. Each part leaves its results in shared memory, so
  // that none has to keep the others' registers.
  PYOFFLINE_HD void finish() {
    double sums[4] = {0, 0, 0, 0}, more[4] = {0, 0, 0, 0};
    const bool is_general = g_.shared().is_general;
    this->for_each_warp([&](const Shared& peer, int warp) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[k] += peer.sums[warp][k];
      if (!is_general) return;
#pragma unroll
      for (int k = 4; k < kSums; ++k) more[k - 4] += peer.sums[warp][k];
    });
    double* const to = g_.shared().scalars.partial;
    keep_sums(add_lanes(sums), 0, to);
    if (is_general) keep_sums(add_lanes(more), 4, to);
    g_.warp_sync();
    if (lane() == 0) keep_stats();
    g_.warp_sync();
    if (lane() == 0) keep_coefs();
    g_.warp_sync();
    if (lane() == 0 && args_.dlogits) keep_gradient();
  }

  // 2^-residual of a plain row, by its series: the residual is below 2^-10.
  PYOFFLINE_HD double without_residual() const {
    const double x = kLn2 * residual();
    return 1.0 - x * (1.0 - x * (0.5 - x * (1.0 / 6.0)));
  }

  PYOFFLINE_HD void keep_stats() const {
    RowScalars& keep = g_.shared().scalars;
    const double slope_of_row = slope(keep.temperature);
    const float label_bent = this->template bent<true>(keep.label_y);
    RowSums& row = keep.sums;
    row.y_max = row.offset = offset_;
    row.m = slope_of_row * static_cast<double>(offset_);
    row.t_label = static_cast<float>(slope_of_row * static_cast<double>(label_bent - offset_));
    row.damp_label = transform_.inner != 0.0f ? 1.0f - label_bent * label_bent : 1.0f;
    const double* const sums = keep.partial;
    const bool is_general = g_.shared().is_general;
    const double factor = is_general ? 1.0 : without_residual();
    const double extra = is_general ? 0.0 : residual();
    row.ones = sums[0];
    row.tail = factor * sums[1];
    row.s = kLn2 * factor * (sums[2] - zero_safe(extra, sums[1]));
    row.tail_squares = factor * factor * sums[3];
    row.sum_ut = is_general ? kLn2 * sums[4] : 0.0;
    const bool has_u = args_.class_weight && is_general;
    keep.sum_u = has_u ? sums[5] : static_cast<double>(args_.vocab);
    keep.stats = finish_stats(row, args_.vocab, keep.sum_u);
  }

  PYOFFLINE_HD void keep_coefs() const {
    RowScalars& keep = g_.shared().scalars;
    if (!args_.coefs) keep.coefs = evaluate(keep.token, keep.stats);
    if (g_.block() == 0) write_scalars(keep.stats, keep.coefs);
    g_.shared().is_silent = is_zero(keep.coefs);
  }

  PYOFFLINE_HD void keep_gradient() const {
    const RowScalars& keep = g_.shared().scalars;
    const double scale = task_.scale ? *task_.scale : 1.0;
    const double factor = scale * keep.weight * args_.grad_scale * args_.logit_scale /
                          static_cast<double>(keep.temperature);
    const double vocab = static_cast<double>(args_.vocab);
    RowGradient& c = g_.shared().gradient;
    c = gradient_constants(keep.coefs, keep.sums, keep.stats, factor, args_.vocab,
                           keep.sum_u / vocab, static_cast<double>(class_weight(label())));
    const double from_pw = kLn2 * c.from_pt;
    c.from_pt = static_cast<float>(from_pw);
    if (g_.shared().is_general) return;
    const double e_factor = without_residual();
    c.from_p = static_cast<float>(e_factor * (c.from_p + zero_safe(from_pw, residual())));
    c.from_pt = static_cast<float>(e_factor * from_pw);
  }

  PYOFFLINE_HD Coefs evaluate(TokenIn token, const RowStats& stats) const {
    token.logp = stats.logp;
    token.entropy = stats.entropy;
    token.lse = stats.lse;
    token.gap = stats.gap;
    return evaluate_program(task_.terms, args_.n_terms, token, task_.extras, row_);
  }

  PYOFFLINE_HD void write_scalars(const RowStats& stats, const Coefs& coefs) const {
    if (args_.logps) args_.logps[row_] = stats.logp;
    if (args_.entropy) args_.entropy[row_] = stats.entropy;
    if (args_.lse) args_.lse[row_] = stats.lse;
    if (args_.gap) args_.gap[row_] = stats.gap;
    if (args_.log_sum_p2) args_.log_sum_p2[row_] = stats.log_sum_p2;
    if (args_.is_top1) args_.is_top1[row_] = stats.is_top1;
    if (args_.loss) args_.loss[row_] = coefs.loss;
    if (!args_.coefs_out) return;
    float* out = args_.coefs_out + row_;
    out[0] = coefs.a;
    out[args_.rows] = coefs.b;
    out[2 * args_.rows] = coefs.c;
    out[3 * args_.rows] = coefs.e;
  }

  // ---- gradient -------------------------------------------------------------------------------
  PYOFFLINE_HD Out* dlogits_row() const {
    return static_cast<Out*>(args_.dlogits) + row_ * args_.dlogits_stride;
  }

  // Where this block's gradient goes: one thread looks it up for all.
  PYOFFLINE_HD void keep_place() const {
    if (!args_.dlogits) return;
    Out* const out = dlogits_row();
    g_.shared().dlogits = out + begin();
    g_.shared().is_aligned = reinterpret_cast<uintptr_t>(out + head()) % (kPer * sizeof(Out)) == 0;
    g_.shared().label_thread = thread_of(label());
  }

  PYOFFLINE_HD void write_gradient() {
    const RowGradient c = g_.shared().gradient;
    if (g_.shared().is_silent) return fill(0.0f);
    if (c.is_nan) return fill(NAN);
    const bool is_finite = c.from_p - c.from_p == 0.0f;
    if (g_.shared().is_general) {
      store_gradient<true, false>(c);
    } else if (is_finite && c.from_pt == 0.0f && c.from_u == 0.0f) {
      store_gradient<false, true>(c);
    } else {
      store_gradient<false, false>(c);
    }
    if (g_.shared().label_thread == g_.thread()) narrow(c.at_label, dlogits_row() + label());
  }

  template <bool kGeneral, bool kSimple>
  PYOFFLINE_HD void store_gradient(const RowGradient& c) {
    const bool is_aligned = g_.shared().is_aligned;
    int index = first_slot();
    if (!kGeneral && is_aligned && (kSimple || c.from_u == 0.0f)) store_steps<kSimple>(c, &index);
    Out* const out = dlogits_row();
#pragma unroll 1
    for (index = settle(index); index != kEnd; index = next(index)) {
      float dz[kPer];
      this->template ordered_slot<kGeneral>(index, dz);
      int first, n;
      span(index, &first, &n);
      full_gradient<kGeneral, kSimple>(c, first, n, dz);
      // narrower elements land on logits that other threads of this slot have yet to read
      if (task_.is_narrowing && index >= held_ && index < kEdges) g_.block_sync();
      store_slot(dz, n, is_aligned, out + first);
    }
  }

  template <bool kSimple>
  PYOFFLINE_HD void store_steps(const RowGradient& c, int* index) const {
    Out* to = static_cast<Out*>(g_.shared().dlogits) + int64_t{kPer} * *index;
#pragma unroll 1
    for (; *index < whole(); *index += step(), to += kPer * step()) {
      float dz[kStep];
      shift_step(*index, dz);
#pragma unroll
      for (int i = 0; i < kStep; ++i) dz[i] = weighed<kSimple>(c, dz[i]);
      store_aligned<kPer>(dz, to);
      store_aligned<kPer, kLanes * kPer>(dz + kPer, to);
      if constexpr (kPackets == 4) {
        store_aligned<kPer, 2 * kLanes * kPer>(dz + 2 * kPer, to);
        store_aligned<kPer, 3 * kLanes * kPer>(dz + 3 * kPer, to);
      }
    }
  }

  // Any coefficients: a product with p_v = 0 is 0 by selection, also where a coefficient is inf.
  template <bool kSimple>
  PYOFFLINE_HD static float weighed(const RowGradient& c, float w) {
    const float e = exp2_flushed(w);
    if (kSimple) return e * c.from_p;
    float value = c.from_p;
    if (c.from_pt != 0.0f) value = fmaf(-c.from_pt, fmaxf(w, kLowestW), value);
    return e != 0.0f ? e * value : 0.0f;
  }

  template <bool kGeneral, bool kSimple>
  PYOFFLINE_HD void full_gradient(const RowGradient& c, int first, int n, float* dz) const {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float bend = this->template bent<kGeneral>(dz[i]);
      float value = weighed<kSimple>(c, this->template shift<kGeneral>(bend));
      if (!kSimple && c.from_u != 0.0f && i < n) {
        const float u = class_weight(first + i);
        value -= u == 0.0f ? 0.0f : c.from_u * u;
      }
      if (kGeneral && transform_.inner != 0.0f) {
        const float damp = 1.0f - bend * bend;
        value = damp == 0.0f ? 0.0f : value * damp;
      }
      dz[i] = value;
    }
  }

  PYOFFLINE_HD void store_slot(const float* dz, int n, bool is_aligned, Out* out) const {
    if (n == kPer && is_aligned) {
      store_aligned<kPer>(dz, out);
      return;
    }
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i < n) narrow(dz[i], out + i);
    }
  }

  // ---- rows without a sweep -------------------------------------------------------------------
  PYOFFLINE_HD void fill(float value) const {
    constexpr int kOutPer = Elements<Out>::kPer;
    Out* out = dlogits_row();
    const int vocab = static_cast<int>(args_.vocab);
    const int stride = g_.blocks() * g_.threads(), rank = g_.block() * g_.threads() + g_.thread();
    const uintptr_t past = reinterpret_cast<uintptr_t>(out) % 16;
    int head = past ? static_cast<int>((16 - past) / sizeof(Out)) : 0;
    if (head > vocab) head = vocab;
    const int packets = (vocab - head) / kOutPer, tail = head + packets * kOutPer;
    float values[kOutPer];
#pragma unroll
    for (int i = 0; i < kOutPer; ++i) values[i] = value;
    for (int i = rank; i < packets; i += stride)
      store_aligned<kOutPer>(values, out + head + i * kOutPer);
    for (int i = rank; i < head; i += stride) narrow(value, out + i);
    for (int i = tail + rank; i < vocab; i += stride) narrow(value, out + i);
  }

  PYOFFLINE_HD void fill_row(float value, const RowStats& stats, const Coefs& coefs) const {
    if (g_.block() == 0 && g_.thread() == 0) write_scalars(stats, coefs);
    if (args_.dlogits) fill(value);
  }

  // The address of a bad label is never formed; its row shows it, and so does the next call.
  PYOFFLINE_HD void mark_bad_label(int64_t label) const {
    const RowStats stats = {NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, NAN, false};
    fill_row(NAN, stats, {NAN, NAN, NAN, NAN, NAN});
    const int64_t lowest = INT32_MIN, highest = INT32_MAX;
    const int64_t shown = label < lowest ? lowest : label > highest ? highest : label;
    if (task_.bad_label && g_.block() == 0 && g_.thread() == 0)
      g_.publish(task_.bad_label,
                 static_cast<int64_t>(static_cast<uint64_t>(shown) << 32 | (row_ & 0xffffffff)));
  }
};

}  // namespace gpu
}  // namespace pyoffline
