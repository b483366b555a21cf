// A standalone check of the CPU row pass against fp64, on every instruction set of this CPU.
//
// Build: tests/cpp/build.sh, which also fails if an ISA object defines a weak symbol. Exit status 1
// after any failure. Not here: the objectives (compared with Python in tests/), torch, the
// bindings, timing (row_pass_time.cpp).
#include "../../csrc/objectives.h"
#include "row_case.h"

using namespace pyoffline;

namespace {

void check_shapes() {
  const DType types[3] = {DType::f32, DType::bf16, DType::f16};
  for (int64_t v :
       {1, 2, 3, 5, 15, 16, 17, 31, 33, 63, 255, 256, 257, 300, 511, 513, 1000, 4099, 32003}) {
    for (DType in : types) {
      for (DType out : types) {
        Case t(v > 1000 ? 2 : 5, v, in, out);
        t.fill(3.0, 0.5, static_cast<uint32_t>(v * 9 + int(in) * 3 + int(out)));
        for (int64_t r = 0; r < t.rows; ++r) {  // rows with a alone take the simple sweep
          if (r % 2)
            for (int k = 1; k < 4; ++k) t.coefs[k * t.rows + r] = 0;
        }
        check(t, "shapes");
      }
    }
  }
  Case big(2, 262147, DType::f32, DType::f32);
  big.fill(1.0, 0.0, 77);
  check(big, "262147");
}

void check_options() {
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  for (int option = 0; option < 64; ++option) {
    for (int64_t v : {37, 1003}) {
      Case t(4, v, option % 2 ? DType::bf16 : DType::f32, DType::f32);
      t.fill(2.0, 0.0, 100 + option);
      for (int64_t k = 0; k < v; ++k)
        t.bias.push_back(normal(rng)), t.u.push_back(k % 5 ? std::fabs(normal(rng)) : 0.0f);
      for (int64_t r = 0; r < t.rows; ++r)
        t.temperature.push_back(0.5f + r), t.weights.push_back(normal(rng));
      if (option & 2) t.args.bias = t.bias.data();
      if (option & 4) t.args.class_weight = t.u.data();
      if (option & 8) t.args.temperature = t.temperature.data();
      if (option & 16) t.args.softcap = 5.0f;
      if (option & 32) t.args.logit_scale = -0.7f;
      t.args.weights = t.weights.data();
      t.args.grad_scale = 4.0f;
      check(t, "options", option & 16 ? 8.0 : 2.0);
    }
  }
}

void check_hard_rows() {
  for (int64_t v : {32000, 151936, 262147}) {
    for (double tail : {1e-2, 1e-4, 1e-6, 1e-9, 1e-12}) {  // confident: the tail sums to `tail`
      Case t(2, v, DType::f32, DType::f32);
      for (int64_t r = 0; r < 2; ++r) {
        for (int64_t k = 0; k < v; ++k)
          put(t.logits.data(), DType::f32, r * t.stride + k,
              static_cast<float>(std::log(tail / v)));
        t.labels[r] = r ? 5 : v - 2;
        put(t.logits.data(), DType::f32, r * t.stride + v - 2, 0.0f);
        t.coefs[r] = -1.0f;
      }
      check(t, "confident");
      const double want = std::expm1(truth(t, 0,
                                           [&] {
                                             std::vector<float> x;
                                             for (int64_t k = 0; k < v; ++k) x.push_back(t.x(0, k));
                                             return x;
                                           }())
                                         .logp);
      expect(std::fabs(t.dx(0, v - 2) - -want * -1.0) <= 1e-6 * std::fabs(want),
             "confident gradient at y", t.dx(0, v - 2), want);
    }
  }
  for (double offset : {1e6, -1e6, 3e4}) {
    Case t(3, 5003, DType::f32, DType::f32);
    t.fill(3.0, offset, 8);
    check(t, "offset");
    Case warm(3, 5003, DType::f32, DType::bf16);
    warm.fill(3.0, offset, 9);
    warm.args.uniform_temperature = 0.7f;
    check(warm, "offset with temperature", 2.0);
  }
  Case ties(2, 4099, DType::bf16, DType::f32);
  ties.fill(0.0, 2.0, 1);
  check(ties, "all equal");
  Case wide(4, 4099, DType::f32, DType::f32);
  wide.fill(60.0, 0.0, 3);
  check(wide, "spread 60");
}

void check_non_finite() {
  for (DType type : {DType::f32, DType::bf16, DType::f16}) {
    for (int64_t v : {1, 7, 16, 100, 513, 3000}) {
      for (int64_t at = 0; at < v; at += 1 + v / 37) {
        Case t(3, v, type, type);
        t.fill(2.0, 0.0, 4);
        Case clean = t;
        clean.args = t.args;
        for (float bad : {NAN, -NAN, INFINITY}) {
          put(t.logits.data(), type, t.stride + at, bad);
          row_pass(t.args);
          expect(std::isnan(t.stats[t.rows + 1]), "NaN logp", t.stats[t.rows + 1], NAN);
          for (int64_t k = 0; k < v; ++k)
            expect(std::isnan(t.dx(1, k)), "NaN row", t.dx(1, k), NAN);
          expect(!std::isnan(t.dx(0, 0)) && !std::isnan(t.dx(2, 0)), "clean neighbours", t.dx(0, 0),
                 0);
        }
      }
    }
  }
  Case none(1, 50, DType::f32, DType::f32);
  none.fill(1.0, 0.0, 1);
  for (int k = 0; k < 50; ++k) put(none.logits.data(), DType::f32, k, -INFINITY);
  row_pass(none.args);
  expect(std::isnan(none.stats[1]), "all -inf", none.stats[1], NAN);

  Case masked(4, 300, DType::f32, DType::f32);  // masked entries, infinite coefficients
  masked.fill(2.0, 0.0, 6);
  for (int64_t r = 0; r < 4; ++r) {
    for (int64_t k = 0; k < 300; k += 3)
      put(masked.logits.data(), DType::f32, r * masked.stride + k, -INFINITY);
    masked.labels[r] = r == 3 ? 30 : 31;
    masked.coefs[3 * 4 + r] = 0;
  }
  masked.coefs[0] = INFINITY;
  masked.coefs[4 + 1] = INFINITY;
  row_pass(masked.args);
  for (int64_t r = 0; r < 4; ++r)
    for (int64_t k = 0; k < 300; k += 3)
      if (k != masked.labels[r])
        expect(masked.dx(r, k) == 0.0f, "masked entry", masked.dx(r, k), 0);
  expect(masked.dx(0, 31) == INFINITY && masked.dx(0, 32) == -INFINITY, "inf coefficient",
         masked.dx(0, 32), -kInf);
  expect(masked.stats[4 + 3] == -INFINITY, "masked label", masked.stats[4 + 3], -kInf);
  expect(masked.dx(3, 30) == masked.coefs[3], "gradient of a masked label", masked.dx(3, 30),
         masked.coefs[3]);
}

void check_ignored() {
  Case t(6, 777, DType::f32, DType::bf16);
  t.fill(2.0, 0.0, 4);
  t.weights = {1, 0.0f, -0.0f, 1, 1, NAN};
  t.labels[3] = -100;
  for (int k = 0; k < 4; ++k) t.coefs[k * 6 + 4] = 0;
  std::vector<float> coefs_out(24, NAN);
  t.args.coefs_out = coefs_out.data();
  t.args.weights = t.weights.data();
  for (int64_t r = 1; r < 4; ++r) put(t.logits.data(), DType::f32, r * t.stride + 5, NAN);
  row_pass(t.args);
  for (int64_t r = 1; r < 5; ++r) {
    for (int64_t k = 0; k < 777; ++k) expect(t.dx(r, k) == 0.0f, "zero row", t.dx(r, k), 0);
    for (int k = 0; k < 6 && r < 4; ++k)
      expect(t.stats[k * 6 + r] == 0.0f, "zero stats", t.stats[k * 6 + r], 0);
    for (int k = 0; k < 4; ++k)
      expect(coefs_out[k * 6 + r] == 0.0f, "zero coefs", coefs_out[k * 6 + r], 0);
    expect(r == 4 || t.top[r] == 0, "zero is_top1", t.top[r], 0);
  }
  expect(std::isnan(t.dx(5, 0)), "NaN weight", t.dx(5, 0), NAN);
}

void check_reproducible() {
  const int64_t rows = 64, v = 2049;
  Case a(rows, v, DType::bf16, DType::bf16), b(rows, v, DType::bf16, DType::bf16);
  a.fill(3.0, 0.0, 4);
  b.coefs = a.coefs;
  for (int64_t r = 0; r < rows; ++r) {  // b: the same rows backwards, other alignment
    std::memcpy(b.logits.data() + 2 * r * b.stride, a.logits.data() + 2 * (rows - 1 - r) * a.stride,
                2 * v);
    b.labels[r] = a.labels[rows - 1 - r];
    for (int k = 0; k < 4; ++k) b.coefs[k * rows + r] = a.coefs[k * rows + rows - 1 - r];
  }
  b.args.coefs = b.coefs.data();
  b.args.threads = 3;
  row_pass(a.args);
  row_pass(b.args);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t q = rows - 1 - r;
    expect(!std::memcmp(b.dlogits.data() + 2 * r * b.stride, a.dlogits.data() + 2 * q * a.stride,
                        2 * v),
           "bitwise rows", double(r), 0);
    for (int k = 1; k < 6; ++k)
      expect(!std::memcmp(&b.stats[k * rows + r], &a.stats[k * rows + q], 4), "bitwise stats",
             b.stats[k * rows + r], a.stats[k * rows + q]);
  }
  for (DType in : {DType::f32, DType::bf16, DType::f16}) {  // in place, same and smaller dtype
    for (DType out : {DType::f32, DType::bf16, DType::f16}) {
      if (size_of(out) > size_of(in)) continue;
      Case c(3, 1111, in, out);
      c.fill(2.0, 0.0, 12);
      for (int k = 1; k < 4; ++k) c.coefs[k * 3 + 1] = 0;
      row_pass(c.args);
      std::vector<char> want = c.dlogits;
      c.args.dlogits = c.logits.data();
      c.args.dlogits_stride = c.stride * size_of(in) / size_of(out);
      row_pass(c.args);
      for (int64_t r = 0; r < 3; ++r) {
        const char* got = c.logits.data() + r * c.stride * size_of(in);
        expect(!std::memcmp(got, want.data() + r * c.stride * size_of(out), 1111 * size_of(out)),
               "in place", double(r), 0);
      }
    }
  }
}

double ulps(float got, double want) {
  if (std::isnan(want)) return std::isnan(got) ? 0 : 1e30;
  const float rounded = static_cast<float>(want);
  if (got == rounded) return 0;
  if (std::isinf(rounded) || std::isinf(got)) return 1e30;
  int exponent;
  std::frexp(want, &exponent);
  return std::fabs(got - want) / std::ldexp(1.0, std::max(exponent, -125) - 24);
}

void scan(const char* name, VecFn fn, double (*want)(double), const std::vector<float>& x,
          double bar) {
  std::vector<float> out(x.size());
  vector_fn(fn, x.data(), out.data(), static_cast<int64_t>(x.size()));
  double worst = 0;
  float at = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    const double u = ulps(out[i], want(double(x[i])));
    if (u > worst) worst = u, at = x[i];
  }
  std::printf("  [%s] %s: max %.3f ULP at %.9g over %zu values\n", isa(), name, worst, at,
              x.size());
  expect(worst <= bar, name, worst, bar);
}

void check_functions() {
  std::vector<float> grid, half, brain, positive;
  for (uint32_t k = 0; k < 65536; ++k) {
    brain.push_back(to_float(bf16{static_cast<uint16_t>(k)}));
    half.push_back(to_float(f16{static_cast<uint16_t>(k)}));
  }
  for (double x = -106; x < 90; x += 1.7e-5) grid.push_back(float(x));
  for (uint32_t u = 0; u < 0x7f800000; u += 611)
    grid.push_back(float_of(u)), grid.push_back(-float_of(u)), positive.push_back(float_of(u));
  for (const auto* x : {&brain, &half, &grid}) {
    scan("exp", VecFn::exp, std::exp, *x, 2.0);
    scan("tanh", VecFn::tanh, std::tanh, *x, 4.0);
  }
  scan("log", VecFn::log, std::log, positive, 1.0);
  const float special[6] = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -104.0f};
  float out[6];
  vector_fn(VecFn::exp, special, out, 6);
  expect(out[0] == 1 && out[1] == 1 && out[2] == INFINITY && out[3] == 0 && std::isnan(out[4]) &&
             out[5] == 0,
         "exp specials", out[2], kInf);
}

void check_arrays() {
  std::mt19937 rng(1);
  std::vector<float> x(70001), out(70001), back(70001);
  for (float& v : x) v = float_of(rng());
  std::vector<uint16_t> h(70001);
  for (DType type : {DType::bf16, DType::f16}) {
    scale_cast(x.data(), DType::f32, h.data(), type, 70001, 0.5f, 2);
    for (int i = 0; i < 70001; ++i) {
      float slot;
      put(&slot, type, 0, x[i] * 0.5f);
      const float a = get(h.data(), type, i), b = get(&slot, type, 0);
      expect(a == b || (std::isnan(a) && std::isnan(b)), "scale_cast", a, b);
    }
  }
  const int64_t rows = 77, cols = 5001;
  std::vector<float> sums(cols, 1.0f), again(cols, 1.0f), m(rows * (cols + 3));
  std::normal_distribution<float> normal;
  for (float& v : m) v = normal(rng);
  column_sum(m.data(), DType::f32, cols + 3, rows, cols, sums.data(), true, 1);
  column_sum(m.data(), DType::f32, cols + 3, rows, cols, again.data(), true, 3);
  for (int64_t c = 0; c < cols; ++c) {
    double want = 1;
    for (int64_t r = 0; r < rows; ++r) want += m[r * (cols + 3) + c];
    expect(std::fabs(sums[c] - want) < 1e-5 && sums[c] == again[c], "column_sum", sums[c], want);
  }
  const float values[3] = {1, NAN, 3}, weights[3] = {2, 0, 0.5};
  expect(weighted_sum(values, weights, 3) == 3.5, "weighted_sum", weighted_sum(values, weights, 3),
         3.5);
}

void check_program() {
  Case t(3, 1000, DType::f32, DType::f32);
  t.fill(2.0, 0.0, 4);
  std::vector<float> old(3), adv = {1.0f, -1.0f, 1.0f}, gate = {1.0f, 2.0f, 0.0f}, coefs_out(12);
  t.args.dlogits = nullptr;
  row_pass(t.args);
  for (int r = 0; r < 3; ++r) old[r] = t.stats[3 + r] - (r == 2 ? 1.0f : 0.05f);
  const float* extras[1] = {gate.data()};
  const Term terms[4] = {
      {ppo_clip_code, -1, 0, 1.0f, {0.2f, 0.2f, INFINITY, INFINITY, 0, 0}},
      {entropy_term_code, 0, 0, -0.01f, {}},
      {smoothing_code, -1, 0, 0.1f, {}},
      {kl_k3_code, -1, 1, 0.0f, {}}};  // switched off: its missing ref must not show
  t.args.terms = terms;
  t.args.n_terms = 4;
  t.args.extras = extras;
  t.args.n_extras = 1;
  t.args.old = old.data();
  t.args.adv = adv.data();
  t.args.coefs = nullptr;
  t.args.coefs_out = coefs_out.data();
  row_pass(t.args);
  for (int r = 0; r < 3; ++r) {
    const double ratio = std::exp(double(t.stats[3 + r]) - old[r]), g = gate[r];
    const double surrogate = r == 2 ? -1.2 : -ratio * adv[r];
    const double want = surrogate - 0.01 * g * t.stats[6 + r] + 0.1 * t.stats[12 + r];
    expect(std::fabs(t.stats[r] - want) < 1e-5, "program loss", t.stats[r], want);
    expect(std::fabs(coefs_out[r] - (r == 2 ? 0 : -ratio * adv[r])) < 1e-5, "program a",
           coefs_out[r], -ratio * adv[r]);
    expect(std::fabs(coefs_out[3 + r] + 0.01 * g) < 1e-8, "program b", coefs_out[3 + r], -0.01 * g);
    expect(coefs_out[9 + r] == 0.1f, "program e", coefs_out[9 + r], 0.1);
  }
}

}  // namespace

int main() {
  for (const std::string& name : isas()) {
    set_isa(name);
    check_functions();
    check_shapes();
    check_options();
    check_hard_rows();
    check_non_finite();
    check_ignored();
    check_reproducible();
    check_arrays();
    check_program();
    std::printf("%s: %d failures so far\n", isa(), failures);
  }
  return failures ? 1 : 0;
}
