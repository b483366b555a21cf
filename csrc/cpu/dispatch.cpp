// Which instruction set runs, and the array functions that share its kernels.
//
// The choice is made once, from the CPU's own report (GCC's __builtin_cpu_supports also asks
// whether the system saves the wide registers) and PYOFFLINE_ISA; set_isa changes it for tests. Not
// here: rows (row_pass.cpp), GEMMs.
#include "dispatch.h"

#include <atomic>
#include <cmath>
#include <cstdlib>

#include "../objectives.h"
#include "dispatch_internal.h"
#include "parallel.h"

namespace pyoffline {

namespace {

int64_t size_of(DType type) { return type == DType::f32 ? 4 : 2; }

// Widest first.
std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    found.push_back(&avx512_kernels);
  }
  if (avx2) found.push_back(&avx2_kernels);
#endif
  found.push_back(&portable_kernels);
  return found;
}

const Kernels* find(const std::string& name) {
  for (const Kernels* kernels : supported()) {
    if (name == kernels->name) return kernels;
  }
  return nullptr;
}

const char* override_name() {
  const char* name = std::getenv("PYOFFLINE_ISA");
  return name && *name ? name : nullptr;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{[] {
    const char* name = override_name();
    const Kernels* asked = name ? find(name) : nullptr;
    return asked ? asked : supported().front();
  }()};
  return kernels;
}

}  // namespace

const Kernels& active_kernels() { return *chosen().load(std::memory_order_relaxed); }

const char* isa() { return active_kernels().name; }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : supported()) names.push_back(kernels->name);
  return names;
}

bool set_isa(const std::string& name) {
  const Kernels* asked = find(name);
  if (asked) chosen().store(asked, std::memory_order_relaxed);
  return asked != nullptr;
}

std::string isa_override_error() {
  const char* name = override_name();
  if (!name || find(name)) return "";
  std::string known;
  for (const std::string& each : isas()) known += (known.empty() ? "" : ", ") + each;
  return std::string("PYOFFLINE_ISA=") + name + " is not available; this CPU runs: " + known;
}

void vector_fn(VecFn fn, const float* x, float* out, int64_t n) {
  if (fn == VecFn::exp) {
    active_kernels().exp(x, out, n);
  } else if (fn == VecFn::tanh) {
    active_kernels().tanh(x, out, n);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      out[i] = static_cast<float>(std::log(static_cast<double>(x[i])));
    }
  }
}

void scale_cast(const void* src, DType src_type, void* dst, DType dst_type, int64_t n, float scale,
                int threads) {
  constexpr int64_t kPiece = 1 << 16;
  const Kernels& kernels = active_kernels();
  parallel_for(threads, (n + kPiece - 1) / kPiece, [&](int64_t k) {
    const int64_t begin = k * kPiece, count = n - begin < kPiece ? n - begin : kPiece;
    kernels.scale_cast(static_cast<const char*>(src) + begin * size_of(src_type), src_type,
                       static_cast<char*>(dst) + begin * size_of(dst_type), dst_type, count, scale);
  });
}

void scale_cast_2d(const float* src, int64_t src_stride, void* dst, DType dst_type,
                   int64_t dst_stride, int64_t rows, int64_t cols, float scale, int threads) {
  const Kernels& kernels = active_kernels();
  const int64_t piece = cols > 0 && cols < (1 << 16) ? (1 << 16) / cols : 1;
  parallel_for(threads, (rows + piece - 1) / piece, [&](int64_t k) {
    const int64_t end = (k + 1) * piece < rows ? (k + 1) * piece : rows;
    for (int64_t r = k * piece; r < end; ++r) {
      kernels.scale_cast(src + r * src_stride, DType::f32,
                         static_cast<char*>(dst) + r * dst_stride * size_of(dst_type), dst_type,
                         cols, scale);
    }
  });
}

void column_sum(const void* x, DType type, int64_t stride, int64_t rows, int64_t cols, float* out,
                bool accumulate, int threads) {
  const Kernels& kernels = active_kernels();
  parallel_for(threads, (cols + kPanel - 1) / kPanel, [&](int64_t k) {
    const int64_t begin = k * kPanel, count = cols - begin < kPanel ? cols - begin : kPanel;
    double sums[kPanel];
    kernels.column_panel(static_cast<const char*>(x) + begin * size_of(type), type, stride, rows,
                         count, sums);
    for (int64_t c = 0; c < count; ++c) {
      const double before = accumulate ? out[begin + c] : 0.0;
      out[begin + c] = static_cast<float>(before + sums[c]);
    }
  });
}

double weighted_sum(const float* values, const float* weights, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) {
    if (!weights) {
      sum += values[i];
    } else if (weights[i] != 0.0f) {
      sum += static_cast<double>(values[i]) * weights[i];
    }
  }
  return sum;
}

const std::vector<std::pair<std::string, int>>& objective_codes() {
#define PYOFFLINE_CODE(name) \
  {                          \
    #name, name##_code       \
  }
  static const std::vector<std::pair<std::string, int>> codes = {
      PYOFFLINE_CODE(nll),
      PYOFFLINE_CODE(weighted_nll),
      PYOFFLINE_CODE(dft),
      PYOFFLINE_CODE(prob_power),
      PYOFFLINE_CODE(luffy),
      PYOFFLINE_CODE(importance_weighted_sft),
      PYOFFLINE_CODE(proximal_sft),
      PYOFFLINE_CODE(importance_sampling),
      PYOFFLINE_CODE(power_is),
      PYOFFLINE_CODE(truncated_is),
      PYOFFLINE_CODE(ppo_clip),
      PYOFFLINE_CODE(decoupled_ppo),
      PYOFFLINE_CODE(cispo),
      PYOFFLINE_CODE(sapo),
      PYOFFLINE_CODE(dppo_tv),
      PYOFFLINE_CODE(dppo_kl),
      PYOFFLINE_CODE(dro),
      PYOFFLINE_CODE(asym_re),
      PYOFFLINE_CODE(topr_token),
      PYOFFLINE_CODE(distill_token),
      PYOFFLINE_CODE(distill_token_is),
      PYOFFLINE_CODE(kl_k1),
      PYOFFLINE_CODE(kl_k2),
      PYOFFLINE_CODE(kl_k3),
      PYOFFLINE_CODE(kl_k3_is),
      PYOFFLINE_CODE(entropy_term),
      PYOFFLINE_CODE(z_loss),
      PYOFFLINE_CODE(smoothing)};
#undef PYOFFLINE_CODE
  return codes;
}

}  // namespace pyoffline
