// Finds oneDNN's bf16 tile kernel (`at::native::cpublas::brgemm`) in libtorch_cpu.so; see
// vendor_gemm.h and tile_gemm.h.
//
// A C++ symbol: its name spells the argument types, so another signature is another name and is not
// found. What is found must multiply one small tile exactly before it is used: a version without
// oneDNN's micro-kernels, or a CPU below its liking, throws there and not in the middle of a loss.
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>

#include "tile_gemm.h"
#include "vendor_gemm.h"

namespace pyoffline {

namespace {

constexpr const char* kMultiply = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb";
constexpr const char* kRelease = "_ZN2at6native7cpublas14brgemm_releaseEb";

std::atomic<bool> enabled{true};

// Where bf16 is widened to fp32 before it is multiplied, MKL's whole products are faster (250
// against 65 GFLOP/s on two Ice Lake cores, 2026-11-21; bench/notes-cpu.md).
bool cpu_multiplies_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

uint16_t bf16_of(int small) {
  const float value = static_cast<float>(small);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

// A product of small integers, which bf16 and fp32 hold exactly.
bool multiplies(const TileKernels& kernels) {
  constexpr int kM = 32, kN = 64, kK = 32;
  static uint16_t a[kM * kK], b[kK * kN];
  static float c[kM * kN];
  const auto left = [](int i, int k) { return (3 * i + k) % 5 - 2; };
  const auto right = [](int k, int j) { return (k + 2 * j) % 7 - 3; };
  for (int i = 0; i < kM; ++i)
    for (int k = 0; k < kK; ++k) a[i * kK + k] = bf16_of(left(i, k));
  for (int k = 0; k < kK; ++k)
    for (int j = 0; j < kN; ++j) b[k / 2 * 2 * kN + 2 * j + k % 2] = bf16_of(right(k, j));
  for (float& x : c) x = 1.0f;
  try {
    kernels.multiply(kM, kN, kK, kK, kN, kN, true, a, b, c, true);
    kernels.release(true);
  } catch (const std::exception&) {
    return false;
  }
  for (int i = 0; i < kM; ++i)
    for (int j = 0; j < kN; ++j) {
      int want = 1;
      for (int k = 0; k < kK; ++k) want += left(i, k) * right(k, j);
      if (c[i * kN + j] != static_cast<float>(want)) return false;
    }
  return true;
}

}  // namespace

const TileKernels* tile_kernels() {
  static std::mutex mutex;
  static TileKernels found;
  static enum { unknown, good, bad } state = unknown;
  if (!enabled) return nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  if (state == unknown) {
    found.multiply = reinterpret_cast<TileKernel>(torch_symbol(kMultiply));
    found.release = reinterpret_cast<TileRelease>(torch_symbol(kRelease));
    if (!found.multiply || !found.release) return nullptr;  // torch may be imported after us
    state = cpu_multiplies_bf16() && multiplies(found) ? good : bad;
  }
  return state == good ? &found : nullptr;
}

void set_tile_gemm(bool on) { enabled = on; }

}  // namespace pyoffline
