// The first two sweeps over a row: its maximum, then the sums of exponentials, per thread, warp,
// block and cluster.
//
// Most rows are plain: w = log2(e) (z - max) is one fused operation, fma(z, k, -(k max)), where the
// rounded product k max leaves a residual that all w of the row share. The sums keep it (2^residual
// is a factor of each e), row_algorithm.h takes it out once a row, in fp64. A general row has a
// bias, a sign, a softcap, a gap to find, or a maximum so large that the residual is not
// small (an infinite or absent one too): there the difference from the maximum is formed first.
#pragma once

#include "row_slots.h"

namespace pyoffline {
namespace gpu {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLowestW = -126.0f;     // 2^w below it is 0 (exp2_flushed)
constexpr float kMostShift = 32768.0f;  // of a plain row: its residual is below 2^-10
constexpr int kSearch = -2;             // peak_: in a whole step, still to be found

// y = sign (logit + bias), bent = tanh(inner y) or y, w = log2(e) (z - m) = k (bent - offset).
struct Transform {
  float sign, inner, k;
};

// A running fp32 sum with the error of its additions.
struct Accumulator {
  float high = 0.0f, low = 0.0f;
  PYOFFLINE_HD void add(float x) {
    const float sum = high + x;
    low += x - (sum - high);
    high = sum;
  }
  PYOFFLINE_HD double finite_total() const { return static_cast<double>(high) + low; }
  PYOFFLINE_HD double total() const { return high - high == 0.0f ? finite_total() : high; }
};

// Of one thread. squares is two plain chains: log_sum_p2 alone reads it.
struct Partial {
  Accumulator tail, s, ut, u;
  float squares[2] = {0.0f, 0.0f};
};

template <class T, class Group>
class RowSweeps : protected RowSlots<T, Group> {
 protected:
  using Base = RowSlots<T, Group>;
  using Base::args_, Base::g_, Base::held_, Base::kEnd, Base::kLanes, Base::kPackets, Base::kPer,
      Base::kPlace, Base::row_, Base::task_;
  using Base::fetch, Base::fetch_whole, Base::first_slot, Base::lane, Base::next, Base::settle,
      Base::span, Base::step, Base::warp, Base::warps, Base::whole;

  PYOFFLINE_HD RowSweeps(Group& group, const RowTask& task, int64_t row) : Base(group, task, row) {}

  PYOFFLINE_HD float temperature() const {
    return args_.temperature ? args_.temperature[row_] : args_.uniform_temperature;
  }

  // z = slope bent
  PYOFFLINE_HD double slope(double temperature) const {
    const double outer = args_.softcap != 0.0f ? args_.softcap : args_.logit_scale;
    return outer == temperature ? 1.0 : fabs(outer / temperature);  // a division less, mostly
  }

  PYOFFLINE_HD void describe() {
    const double scale = args_.logit_scale, temperature_of_row = temperature();
    const bool is_capped = args_.softcap != 0.0f;
    transform_.inner = is_capped ? static_cast<float>(fabs(scale) / args_.softcap) : 0.0f;
    transform_.k = static_cast<float>(slope(temperature_of_row) * kLog2e);
    transform_.sign = (scale < 0.0) != (temperature_of_row < 0.0) ? -1.0f : 1.0f;
  }

  template <bool kGeneral>
  PYOFFLINE_HD float bent(float y) const {
    return kGeneral && transform_.inner != 0.0f ? tanhf(transform_.inner * y) : y;
  }

  PYOFFLINE_HD bool is_plain() const { return fabsf(shift_) < kMostShift; }
  // What every w of a plain row is too large by, exactly.
  PYOFFLINE_HD float residual() const { return fmaf(offset_, transform_.k, shift_); }

  template <bool kGeneral>
  PYOFFLINE_HD void sum_row() {
    find_peak();
    Partial partial;
    int index = first_slot();
    if (!kGeneral) {
      sum_steps<false>(&index, &partial);
      if (partial.s.high != partial.s.high) {  // 0 * -inf, perhaps: again, more slowly
        index = first_slot();
        partial = Partial{};
        sum_steps<true>(&index, &partial);
      }
    }
#pragma unroll 1
    for (index = settle(index); index != kEnd; index = next(index)) {
      float w[kPer];
      shifted<kGeneral>(index, w);
      add_values<kPer, true>(w, index == peak_, kGeneral ? 0.0f : residual(), &partial);
      if (kGeneral && g_.shared().wants_gap) add_weights(index, w, &partial);
    }
    share_sums<kGeneral>(partial);
  }

  template <bool kClamped>
  PYOFFLINE_HD void sum_steps(int* index, Partial* out) const {
    const int peak = peak_ & ~kPlace;  // of its step; below 0 stays there
#pragma unroll 1
    for (; *index < whole(); *index += step()) {
      float w[kStep];
      shift_step(*index, w);
      add_values<kStep, kClamped>(w, *index == peak, residual(), out);
    }
  }

  // w of a whole step of a plain row.
  PYOFFLINE_HD void shift_step(int index, float* w) const {
#pragma unroll
    for (int j = 0; j < kPackets; ++j) widen_packet(fetch_whole(index, j), T{}, w + j * kPer);
#pragma unroll
    for (int i = 0; i < kStep; ++i) w[i] = fmaf(w[i], transform_.k, shift_);
  }

  PYOFFLINE_HD float ordered(float x, int index) const {
    return transform_.sign * (x + (args_.bias ? args_.bias[index] : 0.0f));
  }

  // y of one slot.
  template <bool kGeneral>
  PYOFFLINE_HD void ordered_slot(int slot, float* y) const {
    widen_packet(fetch(slot), T{}, y);
    if (!kGeneral) return;
    int first, n;
    span(slot, &first, &n);
#pragma unroll
    for (int i = 0; i < kPer; ++i) y[i] = i < n ? ordered(y[i], first + i) : -INFINITY;
  }

  // w of `bent` y.
  template <bool kGeneral>
  PYOFFLINE_HD float shift(float bent) const {
    if (kGeneral) return (bent - offset_) * transform_.k;
    return fmaf(bent, transform_.k, shift_);
  }

  // w of one slot; a softcap would make the -inf of an absent element finite.
  template <bool kGeneral>
  PYOFFLINE_HD void shifted(int slot, float* w) const {
    ordered_slot<kGeneral>(slot, w);
    int first, n;
    span(slot, &first, &n);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      w[i] = shift<kGeneral>(bent<kGeneral>(w[i]));
      if (kGeneral && i >= n) w[i] = -INFINITY;
    }
  }

  // The row's maximum, and this thread's slot that holds it, if any.
  template <bool kGeneral>
  PYOFFLINE_HD void find_max(const T* source) {
    int index = first_slot();
    Packet top = lowest_packet<T>();
    this->template copy_row<kGeneral>(source);
#pragma unroll 1
    for (; !kGeneral && index < whole(); index += step()) {
#pragma unroll
      for (int j = 0; j < kPackets; ++j) raise_packet(&top, fetch_whole(index, j), T{});
    }
    float best = packet_max(top, T{});
    peak_ = kSearch;
#pragma unroll 1
    for (index = settle(index); index != kEnd; index = next(index)) {
      float y[kPer], most = -INFINITY;
      ordered_slot<kGeneral>(index, y);
#pragma unroll
      for (int i = 0; i < kPer; ++i) most = fmaxf(most, y[i]);
      if (!(most > best)) continue;
      best = most;
      peak_ = index;
    }
    share_max<kGeneral>(best);
  }

  template <bool kGeneral>
  PYOFFLINE_HD void share_max(float own) {
    const float in_warp = max_of_lanes(own);
    if (lane() == 0) g_.shared().max[warp()] = in_warp;
    g_.sync();
    float best = -INFINITY;
    for_each_warp([&](const Shared& peer, int warp) { best = fmaxf(best, peer.max[warp]); });
    best = max_of_lanes(best);
    offset_ = bent<kGeneral>(best);
    shift_ = -(offset_ * transform_.k);
    if (own != best) peak_ = -1;
  }

  // The slot of a maximum that was found in whole steps.
  PYOFFLINE_HD void find_peak() {
    if (peak_ != kSearch) return;
#pragma unroll 1
    for (int index = first_slot(); index < held_; index = next(index)) {
      if (packet_max(fetch(index), T{}) != offset_) continue;
      peak_ = index;
      return;
    }
  }

  // f(block, warp) for every warp of the group, shared out over the lanes of this one: some lanes
  // to a block, no division.
  template <class F>
  PYOFFLINE_HD void for_each_warp(F f) const {
    constexpr int kMost = Group::kMostBlocks, kShare = kLanes > kMost ? kLanes / kMost : 1;
#pragma unroll
    for (int first = 0; first < kMost; first += kLanes / kShare) {
      const int own = first + lane() / kShare, last = g_.blocks() - 1;
      const Shared& peer = g_.peer(own < last ? own : last);
#pragma unroll 1
      for (int w = own <= last ? lane() % kShare : warps(); w < warps(); w += kShare) f(peer, w);
    }
  }

  PYOFFLINE_HD float max_of_lanes(float x) {
#pragma unroll
    for (int mask = Group::kLanes / 2; mask; mask /= 2) x = fmaxf(x, g_.shuffle_xor(x, mask));
    return x;
  }

  // kCount entries; is_peak: among them is one at the maximum, where w is peak_w; it is left
  // out, to be counted apart, so that a confident row keeps its tail. Unless kClamped, s is NaN
  // after a w of -inf.
  template <int kCount, bool kClamped>
  PYOFFLINE_HD void add_values(const float* w, bool is_peak, float peak_w, Partial* out) const {
    float e[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) e[i] = exp2_flushed(w[i]);
    if (is_peak) {
      bool is_found = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool is_one = !is_found && w[i] == peak_w;
        if (is_one) e[i] = 0.0f;
        is_found = is_found || is_one;
      }
    }
    float tail[2] = {0.0f, 0.0f}, s[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float factor = kClamped ? fmaxf(w[i], kLowestW) : w[i];
      tail[i % 2] = i < 2 ? e[i] : tail[i % 2] + e[i];
      s[i % 2] = i < 2 ? e[i] * factor : fmaf(e[i], factor, s[i % 2]);
      out->squares[i % 2] = fmaf(e[i], e[i], out->squares[i % 2]);
    }
    out->tail.add(tail[0] + tail[1]);
    out->s.add(s[0] + s[1]);
  }

  PYOFFLINE_HD float class_weight(int index) const {
    return args_.class_weight ? args_.class_weight[index] : 1.0f;
  }

  PYOFFLINE_HD void add_weights(int slot, const float* w, Partial* out) const {
    int first, n;
    span(slot, &first, &n);
    float ut = 0.0f, total = 0.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float u = i < n ? class_weight(first + i) : 0.0f;
      ut += u == 0.0f ? 0.0f : u * w[i];
      total += u;
    }
    out->ut.add(ut);
    out->u.add(total);
  }

  // Warp sums into this block's slots, always added in the same order.
  template <bool kGeneral>
  PYOFFLINE_HD void share_sums(const Partial& own) {
    const double ones = peak_ >= 0 ? 1.0 : 0.0;  // the entry that add_values left out
    const double first[4] = {ones, own.tail.finite_total(), own.s.finite_total(),
                             double{own.squares[0]} + own.squares[1]};
    keep_sums(add_lanes(first), 0, g_.shared().sums[warp()]);
    if (!kGeneral) return;
    const double more[4] = {own.ut.total(), own.u.total(), 0.0, 0.0};
    keep_sums(add_lanes(more), 4, g_.shared().sums[warp()]);
  }

  // The warp's sum of sums[k] in the lanes of its quarter k: a lane gives the sums of the other
  // half and keeps its own half's.
  PYOFFLINE_HD double add_lanes(const double (&sums)[4]) const {
    const bool is_upper = lane() & kLanes / 2, is_odd = lane() & kLanes / 4;
    const double low = exchange(sums[0], sums[2], is_upper, kLanes / 2);
    const double high = exchange(sums[1], sums[3], is_upper, kLanes / 2);
    double own = exchange(low, high, is_odd, kLanes / 4);
#pragma unroll
    for (int mask = kLanes / 8; mask; mask /= 2) own += g_.shuffle_xor(own, mask);
    return own;
  }
  PYOFFLINE_HD double exchange(double low, double high, bool is_high, int mask) const {
    return (is_high ? high : low) + g_.shuffle_xor(is_high ? low : high, mask);
  }

  // The sums of add_lanes, of which `first` is the first.
  PYOFFLINE_HD void keep_sums(double own, int first, double* to) const {
    const int k = first + lane() / (kLanes / 4);
    if (lane() % (kLanes / 4) == 0 && k < kSums) to[k] = own;
  }

  int peak_ = 0;  // the slot that holds the maximum, -1 or kSearch
  float offset_ = 0.0f;
  float shift_ = 0.0f;  // -(k offset), rounded
  Transform transform_{};
};

}  // namespace gpu
}  // namespace pyoffline
