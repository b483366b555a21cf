// The group of row_group.h as a thread block cluster: hardware barriers, warp shuffles, distributed
// shared memory, asynchronous 16-byte copies. Below compute capability 9.0 it is one block. Device
// code only.
#pragma once

#include <cuda_runtime.h>

#include "row_group.h"

namespace pyoffline {
namespace gpu {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define PYOFFLINE_CLUSTERS 1
#else
#define PYOFFLINE_CLUSTERS 0
#endif

class CudaGroup {
 public:
  static constexpr int kLanes = 32;
  static constexpr int kMostBlocks = PYOFFLINE_CLUSTERS ? kMaxBlocks : 1;

  __device__ explicit CudaGroup(char* memory) : memory_(memory) {}

  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ int block() const {
#if PYOFFLINE_CLUSTERS
    int rank;
    // volatile: read again where it is needed, not kept in a register
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
#else
    return 0;
#endif
  }
  __device__ int blocks() const {
#if PYOFFLINE_CLUSTERS
    int count;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    return count;
#else
    return 1;
#endif
  }

  template <class X>
  __device__ X shuffle_xor(X x, int mask) const {
    return __shfl_xor_sync(0xffffffffu, x, mask);
  }

  __device__ void warp_sync() const { __syncwarp(); }
  __device__ void block_sync() const { __syncthreads(); }
  __device__ void sync() const {
#if PYOFFLINE_CLUSTERS
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    wait();
#else
    __syncthreads();
#endif
  }
  __device__ void arrive() const {
#if PYOFFLINE_CLUSTERS
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
  }
  __device__ void wait() const {
#if PYOFFLINE_CLUSTERS
    __syncwarp();
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
  }

  __device__ Shared& shared() const { return *reinterpret_cast<Shared*>(memory_); }
  __device__ const Shared& peer(int b) const {
#if PYOFFLINE_CLUSTERS
    const void* address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(memory_), "r"(b));
    return *static_cast<const Shared*>(address);
#else
    (void)b;
    return shared();
#endif
  }
  __device__ Packet* packets() const { return reinterpret_cast<Packet*>(memory_ + sizeof(Shared)); }

  // Past L1: a logit is read from global memory once.
  template <int kPacket>
  __device__ void copy(Packet* to, const void* from) const {
    const unsigned at = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0+%2], [%1+%2], 16;" ::"r"(at), "l"(from),
                 "n"(kPacket * 16)
                 : "memory");
  }
  __device__ void wait_copies() const {
    asm volatile("cp.async.commit_group;\n\tcp.async.wait_group 0;" ::: "memory");
  }
  // The CPU may look at any time.
  __device__ void publish(int64_t* to, int64_t value) const {
    volatile long long* words = reinterpret_cast<volatile long long*>(to);
    words[1] = value;
    __threadfence_system();
    words[0] = 1;
  }

 private:
  char* memory_;
};

}  // namespace gpu
}  // namespace pyoffline
