// Runs the CUDA row algorithm on the CPU: a cluster of real threads takes one row after the other,
// with the row memory poisoned in between.
#pragma once

#include <cstring>
#include <thread>

#include "../../csrc/cuda/row_algorithm.h"
#include "../../csrc/cuda/row_plan.h"
#include "host_group.h"

namespace pyoffline {
namespace gpu {

constexpr int kHostLanes = 4;

template <class T, class Out>
void host_rows(const RowTask& task, int blocks, int threads) {
  HostCluster cluster(blocks, threads, kHostLanes, task.capacity);
  std::vector<std::thread> pool;
  auto work = [&](int block, int thread) {
    for (int64_t row = 0; row < task.args.rows; ++row) {
      if (thread == 0) {
        HostBlock& own = *cluster.block[block];
        std::memset(static_cast<void*>(&own.shared), 0xff, sizeof(own.shared));
        std::memset(static_cast<void*>(own.packets.data()), 0xff,
                    own.packets.size() * sizeof(Packet));
      }
      cluster.barrier.arrive_and_wait();
      HostGroup<kHostLanes> group(cluster, block, thread);
      RowAlgorithm<T, Out, HostGroup<kHostLanes>>(group, task, row).run();
      cluster.barrier.arrive_and_wait();
    }
  };
  for (int b = 0; b < blocks; ++b)
    for (int t = 0; t < threads; ++t) pool.emplace_back(work, b, t);
  for (std::thread& each : pool) each.join();
}

// Returns false for a pair of dtypes that has no kernel.
inline bool host_row_pass(const RowTask& task, int blocks, int threads) {
  const DType in = task.args.logits_type;
  const DType out = task.args.dlogits ? task.args.dlogits_type : in;
  if (in == DType::f32 && out == DType::f32) {
    host_rows<float, float>(task, blocks, threads);
  } else if (in == DType::f32 && out == DType::bf16) {
    host_rows<float, bf16>(task, blocks, threads);
  } else if (in == DType::f32 && out == DType::f16) {
    host_rows<float, f16>(task, blocks, threads);
  } else if (in == DType::bf16 && out == DType::bf16) {
    host_rows<bf16, bf16>(task, blocks, threads);
  } else if (in == DType::f16 && out == DType::f16) {
    host_rows<f16, f16>(task, blocks, threads);
  } else {
    return false;
  }
  return true;
}

}  // namespace gpu
}  // namespace pyoffline
