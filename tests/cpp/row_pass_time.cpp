// row_pass_time [cpu]: times the CPU row pass on [1024, 151936], every instruction set and dtype.
//
// A PPO term with all statistics, on one line of noise repeated. Build: tests/cpp/build.sh. Not
// here: the GEMMs, which bench/ compares with, and any check of the numbers (row_pass_test.cpp).
#include <ctime>
#include <functional>

#include "../../csrc/objectives.h"
#include "row_case.h"

using namespace pyoffline;

namespace {

// Wall time, or with `cpu_time` the calling thread's own time, which other load on the machine
// disturbs less.
bool cpu_time = false;

double now() {
  timespec t;
  clock_gettime(cpu_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

double seconds(int rounds, const std::function<void()>& before, const std::function<void()>& fn) {
  double best = 1e9;
  for (int k = 0; k < rounds; ++k) {
    before();
    const double start = now();
    fn();
    best = std::min(best, now() - start);
  }
  return best;
}

// Milliseconds of [1024, 151936] at two threads (or of 256 rows on one thread, CPU time), and GB/s
// of one read and one write of each row.
void time_type(DType type) {
  const int64_t rows = cpu_time ? 256 : 1024, v = 151936, nbytes_row = (v + 3) * size_of(type);
  Case t(rows, v, type, type == DType::f32 ? DType::bf16 : type);
  std::mt19937 rng(1);
  std::normal_distribution<float> normal;
  for (int64_t k = 0; k < t.stride; ++k) put(t.logits.data(), type, k, 2 * normal(rng));
  const std::vector<char> line(t.logits.begin(), t.logits.begin() + nbytes_row);
  auto refill = [&] {
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(t.logits.data() + r * nbytes_row, line.data(), nbytes_row);
  };
  auto nothing = [] {};
  refill();
  for (int64_t r = 0; r < rows; ++r) t.labels[r] = rng() % v;
  const std::vector<float> old(rows, -11.0f), adv(rows, 1.0f), temperature(rows, 0.8f);
  const Term ppo = {ppo_clip_code, -1, 0, 1.0f, {0.2f, 1e30f, INFINITY, INFINITY, 0, 0}};
  t.args.coefs = nullptr;
  t.args.terms = &ppo;
  t.args.n_terms = 1;
  t.args.old = old.data();
  t.args.adv = adv.data();
  t.args.gap = nullptr;
  t.args.threads = cpu_time ? 1 : 2;
  RowArgs bare = t.args, stats = t.args, capped = t.args, in_place = t.args;
  bare.entropy = bare.log_sum_p2 = nullptr;
  stats.dlogits = nullptr;
  capped.temperature = temperature.data();
  capped.softcap = 30.0f;
  in_place.dlogits = t.logits.data();
  in_place.dlogits_stride = t.stride * size_of(type) / size_of(t.out_type);
  const double gb = 1e-9 * double(rows) * v * (size_of(type) + size_of(t.out_type));
  for (const std::string& name : isas()) {
    set_isa(name);
    const int rounds = name == "portable" ? 2 : 5;
    const double full = seconds(rounds, nothing, [&] { row_pass(t.args); });
    std::printf("%-8s dtype %d: ppo %.1f ms (%.1f GB/s)", isa(), int(type), 1e3 * full, gb / full);
    std::printf("  logp only %.1f", 1e3 * seconds(rounds, nothing, [&] { row_pass(bare); }));
    std::printf("  no grad %.1f", 1e3 * seconds(rounds, nothing, [&] { row_pass(stats); }));
    std::printf("  softcap %.1f", 1e3 * seconds(rounds, nothing, [&] { row_pass(capped); }));
    const double once = seconds(rounds, refill, [&] { row_pass(in_place); });
    std::printf("  in place %.1f (%.1f GB/s)\n", 1e3 * once, gb / once);
    std::fflush(stdout);
    refill();
  }
}

}  // namespace

int main(int argc, char** argv) {
  cpu_time = argc > 1 && !std::strcmp(argv[1], "cpu");
  for (DType type : {DType::bf16, DType::f32, DType::f16}) time_type(type);
  return 0;
}
