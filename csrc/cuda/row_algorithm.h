// The row pass of one row by a group of threads: maximum, sums, objective, gradient.
//
// The row is cut into packets of 16 bytes, block b of the group takes an equal run of them, thread
// i every threads()-th. A thread copies its packets to the block's memory, sweeps them there three
// times (maximum, sums, gradient) and writes the gradient's packets where they belong: each logit
// is read from global memory once. What does not fit (row_plan.h) is read again by each sweep,
// from L2 if it is still there. Sums: 16 elements in fp32, compensated over a thread's share, fp64
// from there on, always in the same order. Between the sweeps one warp of each block runs the fp64
// scalar half of row_pass.h. Not here: threads and memory (row_group.h), launches.
#pragma once

#include "row_group.h"

namespace pyoffline {
namespace gpu {

constexpr float kLog2e = 1.4426950408889634f;
constexpr double kLn2 = 0.6931471805599453;
constexpr float kLowestW = -126.0f;  // 2^w below it is 0 (exp2_flushed)
constexpr int kStep = 16;            // elements of a thread in one unbroken step
constexpr int kAhead = 8;            // steps whose copies are in flight

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

template <class T, class Out, class Group>
class RowAlgorithm {
 public:
  static constexpr int kPer = Elements<T>::kPer, kPackets = Elements<T>::kPackets;
  static_assert(sizeof(Out) <= sizeof(T), "a wider dlogits row would overwrite logits in place");

  PYOFFLINE_HD RowAlgorithm(Group& group, const RowTask& task, int64_t row)
      : g_(group), task_(task), args_(task.args), row_(row) {}

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
    const bool is_general =
        args_.bias || transform_.sign < 0.0f || transform_.inner != 0.0f || wants_gap;
    cut_row(is_general);
    if (g_.thread() == 0) {
      keep_scalars(weight, coefs);
      g_.shared().is_general = is_general;
      g_.shared().wants_gap = wants_gap;
    }
    if (is_general) {
      sum_row<true>();
    } else {
      sum_row<false>();
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
  // ---- geometry -------------------------------------------------------------------------------
  // A thread's packets are its slots: 0 to slots_ - 1 lie threads() apart, and thread 0 of block 0
  // has two more, the elements before the first and after the last whole packet. Sweeps take
  // kPackets slots at a time up to whole_, where every thread holds all of them, then one by one.
  PYOFFLINE_HD void cut_row(bool is_general) {
    const int run = packets_of_block(), first = g_.block() * run, left = packets() - first;
    count_ = left < 0 ? 0 : left < run ? left : run;
    begin_ = head() + first * kPer;
    source_ = reinterpret_cast<const char*>(logits() + begin_);
    slots_ = (count_ + g_.threads() - 1) / g_.threads();
    held_ = count_ <= task_.capacity ? slots_ : task_.capacity / g_.threads();
    const int unbroken = count_ / g_.threads() < held_ ? count_ / g_.threads() : held_;
    whole_ = is_general ? 0 : unbroken / kPackets * kPackets;
    if (g_.thread() == 0) load_edges();
  }

  // Recomputed where they are needed: registers are scarcer than instructions outside the sweeps.
  PYOFFLINE_HD int head() const {
    const int vocab = static_cast<int>(args_.vocab);
    const uintptr_t past = reinterpret_cast<uintptr_t>(logits()) % 16;
    const int head = past ? static_cast<int>((16 - past) / sizeof(T)) : 0;
    return head < vocab ? head : vocab;
  }
  PYOFFLINE_HD int packets() const { return (static_cast<int>(args_.vocab) - head()) / kPer; }
  PYOFFLINE_HD int packets_of_block() const { return (packets() + g_.blocks() - 1) / g_.blocks(); }
  PYOFFLINE_HD int tail() const {
    return static_cast<int>(args_.vocab) - head() - packets() * kPer;
  }

  PYOFFLINE_HD const T* logits() const {
    return static_cast<const T*>(args_.logits) + row_ * args_.logits_stride;
  }

  PYOFFLINE_HD void load_edges() {
    const int vocab = static_cast<int>(args_.vocab);
    g_.shared().has_edges = g_.block() == 0 && packets() * kPer != vocab;
    if (!g_.shared().has_edges) return;
    for (int side = 0; side < 2; ++side) {
      const int n = side ? tail() : head(), first = side ? vocab - n : 0;
      Packet packet = lowest_packet<T>();
      T values[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (i < n) values[i] = logits()[first + i];
      }
      insert(values, n, &packet);
      g_.shared().edges[side] = packet;
    }
  }

  // The first n elements of a packet, by shifts: an indexed copy would go through local memory.
  PYOFFLINE_HD static void insert(const T* values, int n, Packet* packet) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i >= n) continue;
      uint32_t bits = 0;
      memcpy(&bits, values + i, sizeof(T));
      if constexpr (sizeof(T) == 4) {
        packet->words[i] = bits;
      } else {
        const uint32_t keep = i % 2 ? 0x0000ffffu : 0xffff0000u;
        packet->words[i / 2] = (packet->words[i / 2] & keep) | bits << (i % 2 ? 16 : 0);
      }
    }
  }

  PYOFFLINE_HD int end_slot() const {
    return slots_ + (g_.thread() == 0 && g_.shared().has_edges ? 2 : 0);
  }
  PYOFFLINE_HD int packet_index(int slot) const { return slot * g_.threads() + g_.thread(); }

  // First element and number of elements of a slot.
  PYOFFLINE_HD void span(int slot, int* first, int* n) const {
    if (slot >= slots_) {
      *n = slot == slots_ ? head() : tail();
      *first = slot == slots_ ? 0 : static_cast<int>(args_.vocab) - *n;
      return;
    }
    const int index = packet_index(slot);
    *first = begin_ + index * kPer;
    *n = index < count_ ? kPer : 0;
  }

  // Absent elements are -inf.
  PYOFFLINE_HD Packet fetch(int slot) const {
    if (slot >= slots_) return g_.shared().edges[slot - slots_];
    const int index = packet_index(slot);
    if (index >= count_) return lowest_packet<T>();
    if (slot < held_) return load_packet(g_.packets() + index);
    return load_packet(source_ + int64_t{16} * index);
  }

  PYOFFLINE_HD Packet fetch_whole(int slot) const {
    return load_packet(g_.packets() + packet_index(slot));
  }

  // The copies of kPackets slots, as one group.
  PYOFFLINE_HD void copy_slots(int slot) {
    if (slot < held_) {
#pragma unroll
      for (int j = 0; j < kPackets; ++j) {
        const int index = packet_index(slot + j);
        if (slot + j < held_ && index < count_)
          g_.copy(g_.packets() + index, source_ + int64_t{16} * index);
      }
    }
    g_.commit();
  }

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

  PYOFFLINE_HD int label() const { return static_cast<int>(args_.labels[row_]); }

  PYOFFLINE_HD float temperature() const {
    return args_.temperature ? args_.temperature[row_] : args_.uniform_temperature;
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

  // z = slope bent
  PYOFFLINE_HD double slope(double temperature) const {
    const double outer = args_.softcap != 0.0f ? args_.softcap : args_.logit_scale;
    return outer == temperature ? 1.0 : fabs(outer / temperature);  // a division less, mostly
  }

  PYOFFLINE_HD void describe() {
    const double scale = args_.logit_scale, temperature_of_row = temperature();
    const bool is_capped = args_.softcap != 0.0f;
    transform_.inner = is_capped ? static_cast<float>(fabs(scale) / args_.softcap) : 0.0f;
    transform_.k = static_cast<float>(slope(temperature_of_row) * 1.4426950408889634);
    transform_.sign = (scale < 0.0) != (temperature_of_row < 0.0) ? -1.0f : 1.0f;
  }

  template <bool kGeneral>
  PYOFFLINE_HD float bent(float y) const {
    return kGeneral && transform_.inner != 0.0f ? tanhf(transform_.inner * y) : y;
  }

  // ---- sweeps ---------------------------------------------------------------------------------
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

  PYOFFLINE_HD int warp() const { return g_.thread() / Group::kLanes; }
  PYOFFLINE_HD int lane() const { return g_.thread() % Group::kLanes; }
  PYOFFLINE_HD int warps() const { return (g_.threads() + Group::kLanes - 1) / Group::kLanes; }

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

  // The scalar half, by the block's first warp. Each part leaves its results in shared memory, so
  // that none has to keep the others' registers.
  PYOFFLINE_HD void finish() {
    double sums[kSums] = {0, 0, 0, 0, 0, 0};
    for (int i = lane(); i < g_.blocks() * warps(); i += Group::kLanes) {
      const double* slot = g_.peer(i / warps()).sums[i % warps()];
#pragma unroll
      for (int k = 0; k < kSums; ++k) sums[k] += slot[k];
    }
    add_lanes<true>(sums);
    if (lane() == 0) keep_stats(sums);
    g_.warp_sync();
    if (lane() == 0) keep_coefs();
    g_.warp_sync();
    if (lane() == 0 && args_.dlogits) keep_gradient();
  }

  PYOFFLINE_HD void keep_stats(const double* sums) const {
    RowScalars& keep = g_.shared().scalars;
    const double slope_of_row = slope(keep.temperature);
    const float label_bent = bent<true>(keep.label_y);
    RowSums& row = keep.sums;
    row.y_max = row.offset = offset_;
    row.m = slope_of_row * static_cast<double>(offset_);
    row.t_label = static_cast<float>(slope_of_row * static_cast<double>(label_bent - offset_));
    row.damp_label = transform_.inner != 0.0f ? 1.0f - label_bent * label_bent : 1.0f;
    row.ones = sums[0];
    row.tail = sums[1];
    row.s = kLn2 * sums[2];
    row.tail_squares = sums[3];
    row.sum_ut = kLn2 * sums[4];
    keep.sum_u = args_.class_weight ? sums[5] : static_cast<double>(args_.vocab);
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
    g_.shared().gradient =
        gradient_constants(keep.coefs, keep.sums, keep.stats, factor, args_.vocab,
                           keep.sum_u / vocab, static_cast<double>(class_weight(label())));
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
  }

  template <bool kGeneral, bool kSimple>
  PYOFFLINE_HD void store_gradient(const RowGradient& c) {
    Out* out = dlogits_row();
    const uintptr_t start = reinterpret_cast<uintptr_t>(out + head());
    const bool is_aligned = start % (kPer * sizeof(Out)) == 0;
    int slot = 0;
    if (kSimple && is_aligned) {
      Out* first = out + begin_;
#pragma unroll 1
      for (; slot < whole_; slot += kPackets) {
        float dz[kStep];
        widen_whole(slot, dz);
        scale_all(dz);
#pragma unroll
        for (int i = 0; i < kStep; ++i) dz[i] = exp2_flushed(dz[i]) * c.from_p;
#pragma unroll
        for (int j = 0; j < kPackets; ++j)
          store_aligned<kPer>(dz + j * kPer, first + int64_t{kPer} * packet_index(slot + j));
      }
    }
#pragma unroll 1
    for (; slot < end_slot(); ++slot) {
      float dz[kPer];
      ordered_slot<kGeneral>(slot, dz);
      int first, n;
      span(slot, &first, &n);
      full_gradient<kGeneral, kSimple>(c, first, n, dz);
      // narrower elements land on logits that other threads of this slot have yet to read
      if (task_.is_narrowing && slot >= held_ && slot < slots_) g_.block_sync();
      store_slot(dz, n, is_aligned, out + first);
    }
    if (owns_label()) narrow(c.at_label, out + label());
  }

  // Any coefficients: a product with p_v = 0 is 0 by selection, also where a coefficient is inf.
  template <bool kGeneral, bool kSimple>
  PYOFFLINE_HD void full_gradient(const RowGradient& c, int first, int n, float* dz) const {
    const float from_pw = static_cast<float>(kLn2 * c.from_pt);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float bend = bent<kGeneral>(dz[i]);
      const float w = (bend - offset_) * transform_.k, e = exp2_flushed(w);
      float value = c.from_p;
      if (!kSimple && from_pw != 0.0f) value = fmaf(-from_pw, fmaxf(w, kLowestW), value);
      value = kSimple || e != 0.0f ? e * value : 0.0f;
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

  // Whether this thread wrote the label's element (and may now write it again).
  PYOFFLINE_HD bool owns_label() const {
    const int past = label() - head(), run = packets_of_block();
    if (past < 0 || past >= packets() * kPer) return g_.block() == 0 && g_.thread() == 0;
    const int packet = past / kPer;
    return packet / run == g_.block() && packet % run % g_.threads() == g_.thread();
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
    if (task_.bad_label && g_.block() == 0 && g_.thread() == 0)
      g_.publish(task_.bad_label,
                 static_cast<int64_t>(static_cast<uint64_t>(label) << 32 | (row_ & 0xffffffff)));
  }

  Group& g_;
  const RowTask& task_;
  const RowArgs& args_;
  const int64_t row_;
  int begin_ = 0, count_ = 0;             // first element and number of packets of this block
  int slots_ = 0, held_ = 0, whole_ = 0;  // of this thread; those in the row memory; taken together
  const char* source_ = nullptr;          // this block's first packet
  int peak_ = 0;                          // the slot that holds the maximum, or -1
  float offset_ = 0.0f;
  Transform transform_{};
};

}  // namespace gpu
}  // namespace pyoffline
