// One call of the row pass with its memory, and the same row in fp64: for the programs beside it.
//
// `check` runs a case with given coefficients and compares statistics and gradient with `truth`,
// elementwise. Not here: cases.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/half_bits.h"

namespace pyoffline {
namespace {

constexpr double kEps = 1.1920928955078125e-7;
constexpr double kInf = INFINITY;
int failures = 0;

void expect(bool ok, const char* what, double got, double want) {
  if (ok) return;
  if (++failures <= 40) std::printf("FAIL [%s] %s: got %.9g want %.9g\n", isa(), what, got, want);
}

int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

float get(const void* base, DType type, int64_t i) {
  if (type == DType::bf16) return to_float(static_cast<const bf16*>(base)[i]);
  if (type == DType::f16) return to_float(static_cast<const f16*>(base)[i]);
  return static_cast<const float*>(base)[i];
}

void put(void* base, DType type, int64_t i, float x) {
  if (type == DType::bf16) return from_float(x, static_cast<bf16*>(base) + i);
  if (type == DType::f16) return from_float(x, static_cast<f16*>(base) + i);
  static_cast<float*>(base)[i] = x;
}

// One call's memory; `edit` changes the arguments before the call.
struct Case {
  int64_t rows, vocab, stride;
  DType type, out_type;
  std::vector<char> logits, dlogits;
  std::vector<int64_t> labels;
  std::vector<float> coefs, bias, u, temperature, weights, stats;
  std::vector<uint8_t> top;
  RowArgs args{};

  Case(int64_t c, int64_t v, DType in, DType out)
      : rows(c), vocab(v), stride(v + 3), type(in), out_type(out) {
    logits.resize(c * stride * size_of(in));
    dlogits.resize(c * stride * size_of(out), 0x7f);
    labels.resize(c);
    coefs.assign(4 * c, 0.0f);
    stats.assign(7 * c, NAN);
    top.assign(c, 9);
    args.logits = logits.data();
    args.logits_type = in;
    args.dlogits_type = out;
    args.logits_stride = args.dlogits_stride = stride;
    args.dlogits = dlogits.data();
    args.rows = c;
    args.vocab = v;
    args.logit_scale = args.uniform_temperature = args.grad_scale = 1.0f;
    args.labels = labels.data();
    args.ignore_index = -100;
    args.coefs = coefs.data();
    float** outs[6] = {&args.loss, &args.logps, &args.entropy,
                       &args.lse,  &args.gap,   &args.log_sum_p2};
    for (int k = 0; k < 6; ++k) *outs[k] = stats.data() + k * c;
    args.is_top1 = top.data();
    args.threads = 1;
  }
  void fill(double spread, double offset, uint32_t seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<double> normal;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < vocab; ++v)
        put(logits.data(), type, r * stride + v, static_cast<float>(offset + spread * normal(rng)));
      labels[r] = rng() % vocab;
      for (int k = 0; k < 4; ++k) coefs[k * rows + r] = static_cast<float>(normal(rng));
    }
  }
  float x(int64_t r, int64_t v) const { return get(logits.data(), type, r * stride + v); }
  float dx(int64_t r, int64_t v) const { return get(dlogits.data(), out_type, r * stride + v); }
};

struct Truth {
  double logp, entropy, lse, gap, log_sum_p2, size;  // size: the largest |gradient|
  std::vector<double> dx;
};

Truth truth(const Case& t, int64_t r, const std::vector<float>& x) {
  const RowArgs& a = t.args;
  const int64_t V = t.vocab, y = t.labels[r];
  const double T = a.temperature ? a.temperature[r] : a.uniform_temperature;
  std::vector<double> z(V), damp(V, 1.0);
  double m = -kInf, d = 0, s = 0, p2 = 0, ut = 0, mean_u = 0;
  for (int64_t v = 0; v < V; ++v) {
    double w = double(a.logit_scale) * (double(x[v]) + (a.bias ? a.bias[v] : 0.0));
    if (a.softcap) {
      const double th = std::tanh(w / a.softcap);
      damp[v] = 1 - th * th;
      w = a.softcap * th;
    }
    z[v] = w / T;
    m = std::max(m, z[v]);
  }
  double ones = 0, rest = 0;
  for (int64_t v = 0; v < V; ++v) {
    const double e = std::exp(z[v] - m), u = a.class_weight ? a.class_weight[v] : 1.0;
    d += e;
    (z[v] == m ? ones : rest) += e;
    if (e) s += e * (z[v] - m);
    p2 += e * e;
    if (u) ut += u * (z[v] - m);
    mean_u += u / V;
  }
  const double log_d = std::log1p(ones - 1 + rest), H = log_d - s / d;
  Truth out{z[y] - m - log_d,         H, m + log_d, mean_u * log_d - ut / V,
            std::log(p2) - 2 * log_d, 0, {}};
  const float* c = a.coefs + r;
  const double ca = c[0], cb = c[a.rows], cc = c[2 * a.rows], ce = c[3 * a.rows];
  const double f = double(a.weights ? a.weights[r] : 1.0f) * a.grad_scale * a.logit_scale / T;
  for (int64_t v = 0; v < V; ++v) {
    const double lp = z[v] - m - log_d, p = std::exp(lp),
                 u = a.class_weight ? a.class_weight[v] : 1.0;
    double g = v == y ? ca * -std::expm1(out.logp) : -ca * p;
    if (p > 0) g += -cb * p * (lp + H) + cc * p + ce * mean_u * p;
    g -= ce * u / V;
    out.dx.push_back(f * damp[v] * g);
    out.size = std::max(out.size, std::fabs(out.dx.back()));
  }
  return out;
}

double rounding(DType type) {
  return type == DType::f32 ? 0 : type == DType::bf16 ? 1.0 / 256 : 1.0 / 2048;
}

// `slack` multiplies the fp32 bounds (a softcap adds its own rounding of z).
inline void check(Case& t, const char* name, double slack = 1.0) {
  std::vector<std::vector<float>> x(t.rows);
  for (int64_t r = 0; r < t.rows; ++r)
    for (int64_t v = 0; v < t.vocab; ++v) x[r].push_back(t.x(r, v));
  row_pass(t.args);
  char what[160];
  for (int64_t r = 0; r < t.rows; ++r) {
    const Truth want = truth(t, r, x[r]);
    const double w[5] = {want.logp, want.entropy, want.lse, want.gap, want.log_sum_p2};
    for (int k = 0; k < 5; ++k) {
      const double got = t.stats[(k + 1) * t.rows + r];
      std::snprintf(what, sizeof what, "%s V=%ld row %ld stat %d", name, (long)t.vocab, (long)r, k);
      const double bound = 8 * kEps * (1 + std::fabs(w[k])) * slack;
      expect(std::fabs(got - w[k]) <= bound || got == w[k], what, got, w[k]);
      if (k == 0) expect(got <= 0, "logp <= 0", got, 0);
    }
    double worst = 0;
    int64_t at = 0;
    for (int64_t v = 0; v < t.vocab; ++v) {
      const double tiny = t.out_type == DType::f16 ? 3.1e-8 : 1e-40;
      const double bound = std::fabs(want.dx[v]) * rounding(t.out_type) + tiny +
                           slack * (4e-6 * std::fabs(want.dx[v]) + 2 * kEps * want.size);
      const double miss = std::fabs(t.dx(r, v) - want.dx[v]) / bound;
      if (!(miss <= worst)) worst = miss, at = v;
    }
    std::snprintf(what, sizeof what, "%s V=%ld row %ld dlogits[%ld] (y=%ld) %.3g bounds off", name,
                  (long)t.vocab, (long)r, (long)at, (long)t.labels[r], worst);
    expect(worst <= 1.0, what, t.dx(r, at), want.dx[at]);
  }
}

}  // namespace
}  // namespace pyoffline
