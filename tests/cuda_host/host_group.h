// The group of csrc/cuda/row_group.h as CPU threads: every thread of every block is a std::thread,
// every barrier a real one, and the memory that blocks share is ordinary memory, so that a missing
// barrier is a data race that ThreadSanitizer sees.
//
// Copies are kept back until they are waited for: a packet that is read too early is poison. Warps
// are kLanes threads; their shuffles go through slots and a barrier of the warp.
#pragma once

#include <atomic>
#include <barrier>
#include <memory>
#include <vector>

#include "../../csrc/cuda/row_group.h"

namespace pyoffline {
namespace gpu {

// Cluster barriers become block barriers: the race that the sanitizer run must report.
inline bool is_faulty = false;

struct HostWarp {
  explicit HostWarp(int lanes) : barrier(lanes), slots(lanes) {}
  std::barrier<> barrier;
  std::vector<double> slots;
};

struct HostBlock {
  HostBlock(int threads, int lanes, int capacity) : barrier(threads), packets(capacity + 1) {
    for (int i = 0; i < threads; i += lanes) warps.push_back(std::make_unique<HostWarp>(lanes));
  }
  std::barrier<> barrier;
  std::vector<std::unique_ptr<HostWarp>> warps;
  Shared shared;
  std::vector<Packet> packets;  // of the exact size, and one, so that data() is never null
};

struct HostCluster {
  HostCluster(int blocks, int threads, int lanes, int capacity)
      : blocks(blocks), threads(threads), barrier(blocks * threads) {
    for (int b = 0; b < blocks; ++b)
      block.push_back(std::make_unique<HostBlock>(threads, lanes, capacity));
  }
  int blocks, threads;
  std::barrier<> barrier;
  std::vector<std::unique_ptr<HostBlock>> block;
};

template <int kWarp>
class HostGroup {
 public:
  static constexpr int kLanes = kWarp, kMostBlocks = kMaxBlocks;

  HostGroup(HostCluster& cluster, int block, int thread)
      : cluster_(cluster), own_(*cluster.block[block]), block_(block), thread_(thread) {}

  int thread() const { return thread_; }
  int threads() const { return cluster_.threads; }
  int block() const { return block_; }
  int blocks() const { return cluster_.blocks; }

  template <class X>
  X shuffle_xor(X x, int mask) {
    HostWarp& warp = *own_.warps[thread_ / kLanes];
    warp.slots[thread_ % kLanes] = static_cast<double>(x);
    warp.barrier.arrive_and_wait();
    const X other = static_cast<X>(warp.slots[(thread_ % kLanes) ^ mask]);
    warp.barrier.arrive_and_wait();
    return other;
  }

  void warp_sync() { own_.warps[thread_ / kLanes]->barrier.arrive_and_wait(); }
  void block_sync() { own_.barrier.arrive_and_wait(); }
  void sync() { is_faulty ? own_.barrier.arrive_and_wait() : cluster_.barrier.arrive_and_wait(); }
  void arrive() { token_ = std::make_unique<Token>(cluster_.barrier.arrive()); }
  void wait() { cluster_.barrier.wait(std::move(*token_)); }

  Shared& shared() const { return own_.shared; }
  const Shared& peer(int b) const { return cluster_.block[b]->shared; }
  Packet* packets() const { return own_.packets.data(); }

  template <int kPacket>
  void copy(Packet* to, const void* from) {
    open_.emplace_back(to + kPacket, static_cast<const Packet*>(from) + kPacket);
  }
  void wait_copies() {
    for (const auto& [to, from] : open_) *to = load_packet(from);
    open_.clear();
  }
  void publish(int64_t* to, int64_t value) {
    std::atomic<int64_t>* words = reinterpret_cast<std::atomic<int64_t>*>(to);
    words[1].store(value);
    words[0].store(1);
  }

 private:
  using Token = std::barrier<>::arrival_token;
  HostCluster& cluster_;
  HostBlock& own_;
  const int block_, thread_;
  std::unique_ptr<Token> token_;
  std::vector<std::pair<Packet*, const void*>> open_;
};

}  // namespace gpu
}  // namespace pyoffline
