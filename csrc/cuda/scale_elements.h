// grad *= factor in place, one thread's share: what scale_by_upstream.cu runs, and the host tests.
//
// Reads and writes each element once, 16 bytes at a time where the memory starts at a multiple of
// 16; fp32 product, one rounding. Not here: the launch, the factor of 1 (the kernel returns then).
#pragma once

#include "elements.h"

namespace pyoffline {
namespace gpu {

template <class T>
PYOFFLINE_HD inline void scale_elements(T* grad, int64_t size, float factor, int64_t thread,
                                        int64_t threads) {
  constexpr int kPer = Elements<T>::kPer;
  const bool is_aligned = reinterpret_cast<uintptr_t>(grad) % sizeof(Packet) == 0;
  const int64_t packets = is_aligned ? size / kPer : 0;
  for (int64_t i = thread; i < packets; i += threads) {
    T* const at = grad + i * kPer;
    float values[kPer];
    widen_packet(load_packet(at), T{}, values);
#pragma unroll
    for (int k = 0; k < kPer; ++k) values[k] *= factor;
    store_aligned<kPer>(values, at);
  }
  for (int64_t i = packets * kPer + thread; i < size; i += threads)
    narrow(widen(grad[i]) * factor, grad + i);
}

}  // namespace gpu
}  // namespace pyoffline
