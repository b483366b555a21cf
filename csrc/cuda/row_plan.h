// How a launch is shaped: blocks of a cluster, threads of a block, packets of row memory.
// Arithmetic only, for the device's limits; the host tests call it too (tests/cuda_host).
//
// A row is shared by the smallest cluster whose part leaves room for four blocks on a
// multiprocessor: while one block waits for its row, the others compute or write. A row that no
// cluster holds is taken by one block, which keeps what fits and reads the rest again. The numbers
// are from csrc/cuda/README.md.
#pragma once

#include <algorithm>
#include <cstdint>

#include "row_group.h"

namespace pyoffline {
namespace gpu {

struct RowPlan {
  int blocks, threads;
  int64_t capacity;  // packets of row memory of one block
  int64_t shared_bytes;
  bool is_resident;  // the whole row is on chip: each logit is read from device memory once
};

constexpr int64_t kFourPerSm = 56 << 10;  // 227 KiB / 4, less what the driver keeps of each block
constexpr int64_t kReserved = 1 << 10;    // by the driver, for each block

// 256 threads where a multiprocessor holds two blocks at least: 16 warps, and a long share for each
// thread, which pays for what it does once a row.
inline int threads_for(int64_t packets, int64_t shared_bytes, int64_t per_step, int64_t most) {
  if (2 * shared_bytes + kReserved > most) return 1024;
  const int64_t wanted = (packets + per_step - 1) / per_step;
  return static_cast<int>(std::clamp<int64_t>((wanted + 31) / 32 * 32, 64, 256));
}

inline RowPlan plan_row(int64_t vocab, int64_t item_size, const DeviceLimits& limits) {
  const int64_t fixed = static_cast<int64_t>(sizeof(Shared));
  const int64_t packets = (vocab * item_size + 15) / 16;
  const int64_t per_step = item_size == 4 ? 4 : 2;  // packets of a thread's step
  const int most = limits.capability >= 90 ? kMaxBlocks : 1;
  auto bytes_of = [&](int blocks) { return fixed + (packets + blocks - 1) / blocks * 16; };
  int blocks = 1;
  while (blocks < most && bytes_of(blocks) > kFourPerSm) blocks *= 2;
  if (bytes_of(blocks) <= limits.shared_bytes) {
    const int64_t capacity = (packets + blocks - 1) / blocks, bytes = bytes_of(blocks);
    return {blocks, threads_for(capacity, bytes, per_step, limits.shared_bytes), capacity, bytes,
            true};
  }
  const int64_t step = 1024 * per_step;
  const int64_t capacity = (limits.shared_bytes - fixed) / 16 / step * step;
  return {1, 1024, capacity, fixed + capacity * 16, false};
}

}  // namespace gpu
}  // namespace pyoffline
