// The first two sweeps over a row: its maximum, then the sums of exponentials, per thread, warp,
// block and cluster. fp32 over 16 elements, compensated over a thread's share, fp64 from there on.
#pragma once

#include "row_slots.h"

namespace pyoffline {
namespace gpu {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kLowestW = -126.0f;  // 2^w below it is 0 (exp2_flushed)

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
  PYOFFLINE_HD double total() const {
    return high - high == 0.0f ? static_cast<double>(high) + low : high;
  }
};

struct Partial {
  Accumulator tail, s, squares, ut, u;
  float ones = 0.0f;
};

template <class T, class Group>
class RowSweeps : protected RowSlots<T, Group> {
 protected:
  using Base = RowSlots<T, Group>;
  using Base::args_, Base::g_, Base::held_, Base::kPackets, Base::kPer, Base::row_, Base::slots_,
      Base::task_, Base::whole_;
  using Base::copy_slots, Base::end_slot, Base::fetch, Base::fetch_whole, Base::lane, Base::span,
      Base::warp, Base::warps;

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

  template <bool kGeneral>
  PYOFFLINE_HD void sum_row() {
    find_max<kGeneral>();
    Partial partial;
    int slot = 0;
    if (!kGeneral) {
#pragma unroll 1
      for (; slot < whole_; slot += kPackets) {
        float w[kStep];
        widen_whole(slot, w);
        scale_all(w);
        add_values<kStep>(w, slot == peak_, &partial);
      }
    }
#pragma unroll 1
    for (; slot < end_slot(); ++slot) {
      float w[kPer];
      shifted<kGeneral>(slot, w);
      add_values<kPer>(w, slot == peak_, &partial);
      if (kGeneral && g_.shared().wants_gap) add_weights(slot, w, &partial);
    }
    share_sums<kGeneral>(partial);
  }

  PYOFFLINE_HD void widen_whole(int slot, float* x) const {
#pragma unroll
    for (int j = 0; j < kPackets; ++j) widen_packet(fetch_whole(slot + j), T{}, x + j * kPer);
  }

  PYOFFLINE_HD void scale_all(float* x) const {
#pragma unroll
    for (int i = 0; i < kStep; ++i) x[i] = (x[i] - offset_) * transform_.k;
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

  // w of one slot; a softcap would make the -inf of an absent element finite.
  template <bool kGeneral>
  PYOFFLINE_HD void shifted(int slot, float* w) const {
    ordered_slot<kGeneral>(slot, w);
    int first, n;
    span(slot, &first, &n);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      w[i] = (bent<kGeneral>(w[i]) - offset_) * transform_.k;
      if (kGeneral && i >= n) w[i] = -INFINITY;
    }
  }

  // The row's maximum, and this thread's slots that hold it, if any.
  template <bool kGeneral>
  PYOFFLINE_HD void find_max() {
    const int ahead = kGeneral ? held_ : kAhead * kPackets;
#pragma unroll 1
    for (int slot = 0; slot < ahead; slot += kPackets) copy_slots(slot);
    float best = -INFINITY;
    peak_ = 0;
    int slot = 0;
    if (!kGeneral) {
#pragma unroll 1
      for (; slot < whole_; slot += kPackets) {
        g_.template wait_copies<kAhead - 1>();
        float top = packet_max(fetch_whole(slot), T{});
#pragma unroll
        for (int j = 1; j < kPackets; ++j) top = fmaxf(top, packet_max(fetch_whole(slot + j), T{}));
        raise(top, slot, &best);
        copy_slots(slot + kAhead * kPackets);
      }
    }
    g_.template wait_copies<0>();
#pragma unroll 1
    for (; slot < end_slot(); ++slot) {
      float y[kPer], top = -INFINITY;
      ordered_slot<kGeneral>(slot, y);
#pragma unroll
      for (int i = 0; i < kPer; ++i) top = fmaxf(top, y[i]);
      raise(top, slot, &best);
    }
    share_max<kGeneral>(best);
  }

  PYOFFLINE_HD void raise(float top, int slot, float* best) {
    if (!(top > *best)) return;
    *best = top;
    peak_ = slot;
  }

  template <bool kGeneral>
  PYOFFLINE_HD void share_max(float own) {
    const float in_warp = max_of_lanes(own);
    if (lane() == 0) g_.shared().max[warp()] = in_warp;
    g_.sync();
    float best = -INFINITY;
    for (int i = lane(); i < g_.blocks() * warps(); i += Group::kLanes)
      best = fmaxf(best, g_.peer(i / warps()).max[i % warps()]);
    best = max_of_lanes(best);
    offset_ = bent<kGeneral>(best);
    if (own != best) peak_ = -1;
  }

  PYOFFLINE_HD float max_of_lanes(float x) {
#pragma unroll
    for (int mask = Group::kLanes / 2; mask; mask /= 2) x = fmaxf(x, g_.shuffle_xor(x, mask));
    return x;
  }

  // kCount entries; is_peak: among them is one at the maximum, which is counted apart, so that a
  // confident row keeps its tail.
  template <int kCount>
  PYOFFLINE_HD void add_values(const float* w, bool is_peak, Partial* out) const {
    float e[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) e[i] = exp2_flushed(w[i]);
    if (is_peak) {
      bool is_found = false;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const bool is_one = !is_found && w[i] == 0.0f;
        if (is_one) e[i] = 0.0f;
        is_found = is_found || is_one;
      }
      if (is_found) out->ones += 1.0f;
    }
    float tail[4] = {0, 0, 0, 0}, s[4] = {0, 0, 0, 0}, squares[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      tail[i % 4] += e[i];
      s[i % 4] = fmaf(e[i], fmaxf(w[i], kLowestW), s[i % 4]);
      squares[i % 4] = fmaf(e[i], e[i], squares[i % 4]);
    }
    out->tail.add((tail[0] + tail[1]) + (tail[2] + tail[3]));
    out->s.add((s[0] + s[1]) + (s[2] + s[3]));
    out->squares.add((squares[0] + squares[1]) + (squares[2] + squares[3]));
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

  // Warp sums into this block's slots; every lane adds the same pairs in the same order.
  template <bool kGeneral>
  PYOFFLINE_HD void share_sums(const Partial& own) {
    double sums[kSums] = {own.ones,
                          own.tail.total(),
                          own.s.total(),
                          own.squares.total(),
                          kGeneral ? own.ut.total() : 0.0,
                          kGeneral ? own.u.total() : 0.0};
    add_lanes<kGeneral>(sums);
    if (lane() != 0) return;
#pragma unroll
    for (int k = 0; k < kSums; ++k) g_.shared().sums[warp()][k] = sums[k];
  }

  template <bool kGeneral>
  PYOFFLINE_HD void add_lanes(double* sums) {
#pragma unroll
    for (int k = 0; k < (kGeneral ? kSums : kSums - 2); ++k) {
#pragma unroll
      for (int mask = Group::kLanes / 2; mask; mask /= 2) sums[k] += g_.shuffle_xor(sums[k], mask);
    }
  }

  int peak_ = 0;  // the slot that holds the maximum, or -1
  float offset_ = 0.0f;
  Transform transform_{};
};

}  // namespace gpu
}  // namespace pyoffline
