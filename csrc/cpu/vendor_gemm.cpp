// Finds MKL's GEMMs in libtorch_cpu.so and calls them; see vendor_gemm.h.
//
// The search is repeated until it finds something: torch may be imported after us. Symbols are C
// ABI with 32-bit integers (LP64), which is what the wheels are built with.
#include "vendor_gemm.h"

#include <dlfcn.h>
#include <link.h>
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>

#include "parallel.h"

namespace pyoffline {

namespace {

using CblasGemm = void (*)(int layout, int trans_a, int trans_b, int m, int n, int k, float alpha,
                           const void* a, int lda, const void* b, int ldb, float beta, float* c,
                           int ldc);
using Sgemm = void (*)(const char* trans_a, const char* trans_b, const int* m, const int* n,
                       const int* k, const float* alpha, const float* a, const int* lda,
                       const float* b, const int* ldb, const float* beta, float* c, const int* ldc);
using SetThreads = int (*)(int);

constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;

struct Symbols {
  CblasGemm bf16 = nullptr;
  CblasGemm f16 = nullptr;
  Sgemm f32 = nullptr;
  SetThreads set_threads_local = nullptr;
  std::string library;
};

std::atomic<bool> enabled{true};

int find_torch_cpu(dl_phdr_info* info, size_t, void* path) {
  if (!info->dlpi_name || !std::strstr(info->dlpi_name, "libtorch_cpu")) return 0;
  *static_cast<std::string*>(path) = info->dlpi_name;
  return 1;
}

// A handle of the loaded libtorch_cpu.so, whatever file name it was loaded under; null when torch
// is not loaded.
void* loaded_torch_cpu() {
  if (void* handle = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY)) return handle;
  std::string path;
  dl_iterate_phdr(find_torch_cpu, &path);
  return path.empty() ? nullptr : dlopen(path.c_str(), RTLD_NOLOAD | RTLD_LAZY);
}

Symbols search() {
  Symbols found;
  auto lookup = [&](const char* name) -> void* {
    void* symbol = torch_symbol(name);
    Dl_info info;
    if (symbol && found.library.empty() && dladdr(symbol, &info) && info.dli_fname)
      found.library = info.dli_fname;
    return symbol;
  };
  found.bf16 = reinterpret_cast<CblasGemm>(lookup("cblas_gemm_bf16bf16f32"));
  found.f16 = reinterpret_cast<CblasGemm>(lookup("cblas_gemm_f16f16f32"));
  found.f32 = reinterpret_cast<Sgemm>(lookup("sgemm_"));
  found.set_threads_local = reinterpret_cast<SetThreads>(lookup("MKL_Set_Num_Threads_Local"));
  return found;
}

Symbols symbols() {
  static std::mutex mutex;
  static Symbols found;
  std::lock_guard<std::mutex> lock(mutex);
  if (!found.bf16 && !found.f16 && !found.f32) found = search();
  return found;
}

bool has(const Symbols& found, DType type) {
  if (type == DType::bf16) return found.bf16;
  return type == DType::f16 ? found.f16 != nullptr : found.f32 != nullptr;
}

std::string missing_reason(const Symbols& found) {
  if (!enabled) return "switched off by set_gemm(False)";
  std::string names;
  if (!found.bf16) names += " cblas_gemm_bf16bf16f32";
  if (!found.f16) names += " cblas_gemm_f16f16f32";
  if (!found.f32) names += " sgemm_";
  if (names.empty()) return "";
  if (found.library.empty() && !loaded_torch_cpu()) return "torch is not imported";
  return "the loaded torch does not export" + names;
}

// In a forked child the thread pool is a copy without threads: one thread, for the length of one
// call. Both settings are needed: the bf16 and fp16 products ask OpenMP, sgemm asks MKL.
class SerialInFork {
 public:
  explicit SerialInFork(SetThreads set_mkl) : forked_(in_forked_child()), set_mkl_(set_mkl) {
    if (!forked_) return;
    if (set_mkl_) mkl_threads_ = set_mkl_(1);
    omp_threads_ = omp_get_max_threads();
    omp_set_num_threads(1);
  }
  ~SerialInFork() {
    if (!forked_) return;
    if (set_mkl_) set_mkl_(mkl_threads_);
    omp_set_num_threads(omp_threads_);
  }
  SerialInFork(const SerialInFork&) = delete;
  SerialInFork& operator=(const SerialInFork&) = delete;

 private:
  bool forked_;
  SetThreads set_mkl_;
  int mkl_threads_ = 0, omp_threads_ = 1;
};

int narrow(int64_t value, const char* what) {
  if (value > std::numeric_limits<int>::max())
    throw std::invalid_argument(std::string("gemm: expected ") + what +
                                " below 2^31, the vendor GEMM's limit, got " +
                                std::to_string(value) + "; split the work into smaller chunks");
  return static_cast<int>(value);
}

// The vendor wants a row stride of at least the row length, also where there is a single row or
// none.
int leading(const Operand& x, int64_t rows, int64_t cols) {
  int64_t stored_rows = x.transposed ? cols : rows, stored_cols = x.transposed ? rows : cols;
  int64_t stride = stored_rows > 1 ? x.row_stride : stored_cols;
  return narrow(std::max<int64_t>(stride, 1), "a row stride");
}

void scale_rows(const Product& p) {
  for (int64_t i = 0; i < p.m; ++i)
    for (int64_t j = 0; j < p.n; ++j) {
      float& c = p.c[i * p.ldc + j];
      c = p.beta == 0 ? 0.0f : p.beta * c;
    }
}

}  // namespace

void* torch_symbol(const char* name) {
  void* torch = loaded_torch_cpu();
  void* symbol = torch ? dlsym(torch, name) : nullptr;
  return symbol ? symbol : dlsym(RTLD_DEFAULT, name);
}

void require_vendor_gemm(DType type) {
  Symbols found = symbols();
  if (enabled && (has(found, type) || tile_kernels_of(type))) return;
  throw std::runtime_error("gemm: no vendor GEMM for this dtype (" + missing_reason(found) +
                           "); use torch's own products");
}

const TileKernels* tile_kernels_of(DType type) {
  return enabled && type == DType::bf16 ? tile_kernels() : nullptr;
}

void vendor_gemm(const Product& p) {
  require_vendor_gemm(p.type);
  if (p.m == 0 || p.n == 0) return;
  if (p.k == 0) return scale_rows(p);
  Symbols found = symbols();
  int m = narrow(p.m, "rows"), n = narrow(p.n, "columns"), k = narrow(p.k, "an inner size");
  int lda = leading(p.a, p.m, p.k), ldb = leading(p.b, p.k, p.n);
  int ldc = narrow(p.m > 1 ? p.ldc : p.n, "a row stride");
  SerialInFork serial(found.set_threads_local);
  if (p.type == DType::f32) {
    // column-major: c^T = op(b)^T op(a)^T, and every row-major matrix is its own transpose there
    const float one = 1.0f;
    found.f32(p.b.transposed ? "T" : "N", p.a.transposed ? "T" : "N", &n, &m, &k, &one,
              static_cast<const float*>(p.b.data), &ldb, static_cast<const float*>(p.a.data), &lda,
              &p.beta, p.c, &ldc);
    return;
  }
  CblasGemm gemm = p.type == DType::bf16 ? found.bf16 : found.f16;
  gemm(kRowMajor, p.a.transposed ? kTrans : kNoTrans, p.b.transposed ? kTrans : kNoTrans, m, n, k,
       1.0f, p.a.data, lda, p.b.data, ldb, p.beta, p.c, ldc);
}

GemmInfo gemm_info() {
  Symbols found = symbols();
  const bool on = enabled, tiles = tile_kernels_of(DType::bf16);
  return {on && (found.bf16 || tiles), on && found.f16, on && found.f32, tiles, found.library,
          missing_reason(found)};
}

void set_gemm(bool on) { enabled = on; }

}  // namespace pyoffline
