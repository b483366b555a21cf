// Random and edge calls of the CPU kernels on buffers of the exact size: for sanitizer builds.
//
// Every array is its own malloc of exactly the bytes that the call may touch, so that one element
// too many is a report. The vendor GEMMs are naive stand-ins exported from this program, found the
// way torch's are; what the panels compute is compared with one product. Numbers are not checked
// otherwise: row_pass_test.cpp does that.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/gemm.h"
#include "../../csrc/cpu/half_bits.h"
#include "../../csrc/distill_args.h"
#include "pack_case.h"
#include "tile_case.h"

namespace {

int fake_gemm_calls = 0;

template <class T>
float element(const void* x, bool transposed, int64_t stride, int64_t i, int64_t j) {
  return pyoffline::to_float(
      static_cast<const T*>(x)[transposed ? j * stride + i : i * stride + j]);
}

template <class T>
void naive(bool ta, bool tb, int m, int n, int k, float alpha, const void* a, int lda,
           const void* b, int ldb, float beta, float* c, int ldc) {
  ++fake_gemm_calls;
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = 0;
      for (int l = 0; l < k; ++l)
        sum += element<T>(a, ta, lda, i, l) * element<T>(b, tb, ldb, l, j);
      float& out = c[int64_t(i) * ldc + j];
      out = alpha * sum + (beta == 0 ? 0.0f : beta * out);
    }
}

}  // namespace

extern "C" {
void cblas_gemm_bf16bf16f32(int, int ta, int tb, int m, int n, int k, float alpha, const void* a,
                            int lda, const void* b, int ldb, float beta, float* c, int ldc) {
  naive<pyoffline::bf16>(ta == 112, tb == 112, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
void cblas_gemm_f16f16f32(int, int ta, int tb, int m, int n, int k, float alpha, const void* a,
                          int lda, const void* b, int ldb, float beta, float* c, int ldc) {
  naive<pyoffline::f16>(ta == 112, tb == 112, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
// column-major: the same product with the operands exchanged
void sgemm_(const char* ta, const char* tb, const int* m, const int* n, const int* k,
            const float* alpha, const float* a, const int* lda, const float* b, const int* ldb,
            const float* beta, float* c, const int* ldc) {
  naive<float>(*tb == 'T', *ta == 'T', *n, *m, *k, *alpha, b, *ldb, a, *lda, *beta, c, *ldc);
}
}

namespace pyoffline {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::bf16, DType::f16};

int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

class Rng {
 public:
  explicit Rng(uint32_t seed) : engine_(seed) {}
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  bool chance(int percent) { return below(100) < percent; }
  float value() {
    const float special[] = {INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1e30f, -1e30f, 1e-40f};
    return chance(2) ? special[below(8)] : 3 * normal_(engine_);
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// Exact-size memory, one malloc each, freed with the call.
class Memory {
 public:
  ~Memory() {
    for (void* block : blocks_) std::free(block);
  }
  template <class T>
  T* make(int64_t count) {
    void* block = std::malloc(count * sizeof(T));
    if (!block && count) std::abort();
    if (block) std::memset(block, 0x7f, count * sizeof(T));
    blocks_.push_back(block);
    return static_cast<T*>(block);
  }
  float* floats(Rng& rng, int64_t count) {
    float* x = make<float>(count);
    for (int64_t i = 0; i < count; ++i) x[i] = rng.value();
    return x;
  }
  float* maybe(Rng& rng, int64_t count) { return rng.chance(50) ? floats(rng, count) : nullptr; }
  void* matrix(Rng& rng, DType type, int64_t rows, int64_t cols, int64_t stride) {
    const int64_t count = rows == 0 ? 0 : (rows - 1) * stride + cols;
    char* x = make<char>(count * size_of(type));
    for (int64_t i = 0; i < count; ++i) {
      if (type == DType::f32) from_float(rng.value(), reinterpret_cast<float*>(x) + i);
      if (type == DType::bf16) from_float(rng.value(), reinterpret_cast<bf16*>(x) + i);
      if (type == DType::f16) from_float(rng.value(), reinterpret_cast<f16*>(x) + i);
    }
    return x;
  }

 private:
  std::vector<void*> blocks_;
};

void draw_program(Rng& rng, RowArgs& args, std::vector<Term>& terms) {
  const auto& codes = objective_codes();
  for (int64_t k = 1 + rng.below(3); k > 0; --k) {
    Term term{};
    term.code = codes[rng.below(static_cast<int64_t>(codes.size()))].second;
    term.gate = static_cast<int32_t>(rng.below(args.n_extras + 1)) - 1;
    term.anchor = 1 + static_cast<int32_t>(rng.below(3));
    term.scale = rng.value();
    for (float& p : term.params) p = rng.chance(20) ? INFINITY : 0.5f;
    terms.push_back(term);
  }
  args.terms = terms.data();
  args.n_terms = static_cast<int32_t>(terms.size());
}

void draw_outputs(Rng& rng, Memory& memory, RowArgs& args) {
  const int64_t rows = args.rows;
  float** outputs[] = {&args.loss, &args.logps, &args.entropy,
                       &args.lse,  &args.gap,   &args.log_sum_p2};
  for (float** out : outputs)
    if (rng.chance(60)) *out = memory.make<float>(rows);
  if (rng.chance(50)) args.is_top1 = memory.make<uint8_t>(rows);
  if (rng.chance(50)) args.coefs_out = memory.make<float>(4 * rows);
  if (rng.chance(25) && args.logits_stride >= args.vocab) {  // in place
    const bool narrow = args.logits_type == DType::f32 && rng.chance(50);
    args.dlogits = const_cast<void*>(args.logits);
    args.dlogits_type = narrow ? DType::bf16 : args.logits_type;
    args.dlogits_stride = args.logits_stride * (narrow ? 2 : 1);
  } else if (rng.chance(70)) {
    args.dlogits_type = kTypes[rng.below(3)];
    args.dlogits_stride = args.vocab + rng.below(4);
    args.dlogits = memory.matrix(rng, args.dlogits_type, rows, args.vocab, args.dlogits_stride);
  }
}

// A drawn call of row_pass and everything that it points into.
struct RowDraw {
  Memory memory;
  RowArgs args{};
  std::vector<Term> terms;
  const float* extras[2];

  RowDraw(Rng& rng, int64_t vocab, int threads) {
    const int64_t rows = rng.below(40);
    args.rows = rows;
    args.vocab = vocab;
    args.logits_type = kTypes[rng.below(3)];
    args.logits_stride = rng.chance(10) ? 0 : vocab + rng.below(5);
    args.logits = memory.matrix(rng, args.logits_type, rows, vocab, args.logits_stride);
    int64_t* labels = memory.make<int64_t>(rows);
    for (int64_t i = 0; i < rows; ++i) labels[i] = rng.chance(15) ? -100 : rng.below(vocab);
    args.labels = labels;
    args.ignore_index = -100;
    args.bias = memory.maybe(rng, vocab);
    args.class_weight = memory.maybe(rng, vocab);
    args.temperature = memory.maybe(rng, rows);
    args.softcap = rng.chance(30) ? 10.0f : 0.0f;
    args.logit_scale = rng.chance(30) ? -0.7f : 1.0f;
    args.uniform_temperature = 1.3f;
    args.grad_scale = 2.0f;
    args.weights = memory.maybe(rng, rows);
    args.old = memory.floats(rng, rows);
    args.mu = memory.floats(rng, rows);
    args.ref = memory.floats(rng, rows);
    args.adv = memory.maybe(rng, rows);
    for (const float*& extra : extras) extra = memory.floats(rng, rows);
    args.extras = extras;
    args.n_extras = static_cast<int32_t>(rng.below(3));
    if (rng.chance(70)) draw_program(rng, args, terms);
    if (!args.n_terms) args.coefs = memory.floats(rng, 4 * rows);
    draw_outputs(rng, memory, args);
    args.threads = threads;
  }
};

void one_row_pass(Rng& rng, int64_t vocab, int threads) {
  const RowDraw draw(rng, vocab, threads);
  row_pass(draw.args);
}

// The teacher's side of a drawn call: logits of its own head, or a top-k with ascending ids.
void draw_teacher(Rng& rng, Memory& memory, DistillArgs& args) {
  const int64_t rows = args.row.rows, vocab = args.row.vocab;
  RowArgs& teacher = args.teacher;
  teacher.rows = rows;
  teacher.vocab = vocab;
  teacher.labels = args.row.labels;
  teacher.weights = args.row.weights;
  teacher.ignore_index = args.row.ignore_index;
  teacher.logit_scale = rng.chance(30) ? -0.7f : 1.0f;
  teacher.uniform_temperature = 0.8f;
  if (rng.chance(60)) {
    teacher.logits_type = kTypes[rng.below(3)];
    teacher.logits_stride = rng.chance(10) ? 0 : vocab + rng.below(5);
    teacher.logits = memory.matrix(rng, teacher.logits_type, rows, vocab, teacher.logits_stride);
    teacher.bias = memory.maybe(rng, vocab);
    teacher.softcap = rng.chance(30) ? 10.0f : 0.0f;
    return;
  }
  args.k = 1 + rng.below(vocab < 40 ? vocab : 40);
  int64_t* ids = memory.make<int64_t>(rows * args.k);
  float* logps = memory.floats(rng, rows * args.k);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t room = vocab / args.k, first = rng.below(room + vocab % args.k);
    for (int64_t j = 0; j < args.k; ++j) ids[i * args.k + j] = first % room + j * room;
  }
  args.topk_ids = ids;
  args.topk_logps = logps;
  args.topk_tail = memory.floats(rng, rows);
}

void one_distill(Rng& rng, int64_t vocab, int threads) {
  RowDraw draw(rng, vocab, threads);
  DistillArgs args{};
  draw.args.class_weight = nullptr;
  args.row = draw.args;
  draw_teacher(rng, draw.memory, args);
  DivergenceTerm terms[kMaxDivergences];
  args.n_divergences = 1 + static_cast<int32_t>(rng.below(kMaxDivergences));
  for (int32_t k = 0; k < args.n_divergences; ++k) {
    const int32_t gate = static_cast<int32_t>(rng.below(args.row.n_extras + 1)) - 1;
    const int32_t code = 1 + static_cast<int32_t>(rng.below(alpha_divergence_code));
    terms[k] = {code, gate, rng.value(), 0.1 + 0.2 * static_cast<double>(rng.below(4))};
  }
  args.divergences = terms;
  args.values = draw.memory.make<float>(args.n_divergences * args.row.rows);
  args.teacher_entropy = draw.memory.make<float>(args.row.rows);
  args.top1_agreement = draw.memory.make<uint8_t>(args.row.rows);
  distill_row_pass(args);
}

void one_array_call(Rng& rng, int threads) {
  Memory memory;
  const int64_t rows = rng.below(9), cols = 1 + rng.below(2500), pad = rng.below(3);
  const DType from = kTypes[rng.below(3)], to = kTypes[rng.below(3)];
  void* x = memory.matrix(rng, from, rows, cols, cols);
  scale_cast(x, from, memory.make<char>(rows * cols * size_of(to)), to, rows * cols, 0.5f, threads);
  scale_cast(x, from, x, from, rows * cols, 2.0f, threads);
  const void* wide = memory.matrix(rng, DType::f32, rows, cols, cols + pad);
  void* cast = memory.matrix(rng, to, rows, cols, cols + 1);
  scale_cast_2d(static_cast<const float*>(wide), cols + pad, cast, to, cols + 1, rows, cols, 0.5f,
                threads);
  float* sums = memory.floats(rng, cols);
  column_sum(x, from, cols, rows, cols, sums, rng.chance(50), threads);
  weighted_sum(memory.floats(rng, cols), memory.maybe(rng, cols), cols);
  for (VecFn fn : {VecFn::exp, VecFn::tanh, VecFn::log})
    vector_fn(fn, memory.floats(rng, cols), memory.make<float>(cols), cols);
}

// Panels against one product; sizes cross the panel borders.
void one_gemm(Rng& rng, DType type, int64_t vocab) {
  Memory memory;
  const int64_t c = 1 + rng.below(4), d = 1 + rng.below(6), pad = rng.below(3);
  auto make = [&](DType t, int64_t rows, int64_t cols) {
    void* data = memory.matrix(rng, t, rows, cols, cols + pad);
    return Matrix{data, t, rows, cols, cols + pad};
  };
  const Matrix hidden = make(type, c, d), weight = make(type, vocab, d);
  const Matrix dlogits = make(type, c, vocab);
  const Matrix whole = make(DType::f32, c, vocab), rounded = make(DType::bf16, c, vocab);
  gemm_logits(hidden, weight, whole, 2);
  gemm_logits(hidden, weight, rounded, 2);
  for (int64_t i = 0; i < c * (vocab + pad) - pad; ++i) {
    bf16 want;
    from_float(static_cast<float*>(whole.data)[i], &want);
    const int64_t col = i % (vocab + pad);
    if (col < vocab && std::memcmp(&want, static_cast<bf16*>(rounded.data) + i, 2)) {
      std::printf("FAIL: panel and whole product differ at column %ld\n", (long)col);
      std::exit(1);
    }
  }
  gemm_dhidden(dlogits, weight, make(DType::f32, c, d), 2);
  const Matrix acc = make(DType::f32, vocab, d), none{nullptr, DType::f32, 0, 0, 0};
  gemm_dweight(dlogits, hidden, {acc, 1.0f, make(DType::bf16, vocab, d), 0.5f}, 2);
  gemm_dweight(dlogits, hidden, {none, 0.0f, make(type, vocab, d), 0.5f}, 2);
}

void run_all(uint32_t seed, int calls, int threads) {
  Rng rng(seed);
  const int64_t edges[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 1023, 4097};
  for (int i = 0; i < calls; ++i) {
    one_row_pass(rng, rng.chance(70) ? edges[rng.below(17)] : 1 + rng.below(3000), threads);
    one_distill(rng, rng.chance(70) ? edges[rng.below(17)] : 1 + rng.below(3000), threads);
    if (i % 4 == 0) one_array_call(rng, threads);
  }
}

}  // namespace
}  // namespace pyoffline

int main(int argc, char** argv) {
  using namespace pyoffline;
  const int calls = argc > 1 ? std::atoi(argv[1]) : 1000;
  for (const std::string& name : isas()) {
    set_isa(name);
    run_all(1, calls, 1);
    run_all(2, calls, 3);
    // several callers at once, as torch's autograd threads do
    std::vector<std::thread> callers;
    for (uint32_t t = 0; t < 3; ++t) callers.emplace_back(run_all, 3 + t, calls / 4, 2);
    for (std::thread& caller : callers) caller.join();
  }
  Rng rng(9);
  for (DType type : kTypes)
    for (int64_t vocab : {1, 1023, 1024, 1025, 2047, 2048, 2049, 4097}) one_gemm(rng, type, vocab);
  int blocks = pack_case::run_all();
  int tiles = tile_case::run_all(rng, 1) + tile_case::run_all(rng, 3);
  if (pack_detail::wide_pack()) {
    pack_detail::wide_pack() = false;
    blocks += pack_case::run_all();
    tiles += tile_case::run_all(rng, 3);
  }
  std::printf(
      "sanitize_driver: %d calls on each of %d paths, %d products, %d of tiles, %d blocks packed\n",
      6 * calls, (int)isas().size(), fake_gemm_calls, tiles, blocks);
  return fake_gemm_calls > 0 ? 0 : 1;
}
