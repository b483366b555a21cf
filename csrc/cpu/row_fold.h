// Joining the sums of two parts of one row, so that a row can be summed panel by panel.
//
// Each part has its own maximum; the lower one is brought to the higher in fp64. A part without a
// finite entry has no maximum to be brought from and joins by `add_masked`. Not here: the sums of a
// part (sweeps.h), what becomes of the whole (row_pass.h).
#pragma once

#include <cmath>
#include <limits>

#include "../row_pass.h"

namespace pyoffline {

class RowFold {
 public:
  // sum_u: of the part's class weights (its width where there are none).
  void add(const RowSums& part, double sum_u, bool has_label) {
    if (has_label) {
      label_m_ = part.m;
      t_label_ = part.t_label;
    }
    if (empty_) {
      sums_ = part;
      sum_u_ = sum_u;
      empty_ = false;
      return;
    }
    const bool rises = part.m > sums_.m;
    const RowSums high = rises ? part : sums_, low = rises ? sums_ : part;
    const double shift = low.m - high.m, factor = std::exp(shift), low_d = low.ones + low.tail;
    const double low_u = rises ? sum_u_ : sum_u;
    sums_ = high;
    sums_.tail += factor * low_d;
    sums_.s += factor * (low.s + shift * low_d);
    sums_.tail_squares += factor * factor * (low.ones + low.tail_squares);
    sums_.sum_ut += low.sum_ut + (low_u == 0.0 ? 0.0 : shift * low_u);
    sum_u_ += sum_u;
  }

  // Every entry is -inf or, with has_nan, some are NaN. has_weight: a class weight is not 0.
  void add_masked(bool has_nan, bool has_weight, bool has_label) {
    if (has_label) {
      label_m_ = -std::numeric_limits<double>::infinity();
      t_label_ = 0.0;
    }
    poison_ |= has_nan;
    if (has_weight) masked_ut_ = -std::numeric_limits<double>::infinity();
  }

  RowSums total() const {
    RowSums out = sums_;
    const double nan = std::numeric_limits<double>::quiet_NaN();
    if (empty_) out = {};
    out.t_label = static_cast<float>((label_m_ - out.m) + t_label_);
    out.sum_ut += masked_ut_;
    if (empty_ || poison_) out.tail = out.s = out.tail_squares = out.sum_ut = nan;
    if (empty_) out.t_label = static_cast<float>(nan);
    return out;
  }

 private:
  bool empty_ = true, poison_ = false;
  RowSums sums_ = {};
  double sum_u_ = 0.0, label_m_ = 0.0, t_label_ = 0.0, masked_ut_ = 0.0;
};

}  // namespace pyoffline
