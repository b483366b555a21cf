// How one row is cut: packets of 16 bytes, a run of them for each block, slots for each thread, and
// the elements at the edges that fill no packet. Where a slot's packet lies: in the block's memory,
// in global memory, or nowhere. Not here: what is computed from them.
//
// A slot is the index of a packet in its block. The packets on chip are dealt out in steps: a warp
// takes kPackets * kLanes in a row, its lanes each kLanes-th, the next step is step() packets on.
// Sweeps take whole steps in an unbroken loop (index < whole()), then slot by slot what is left of
// them, in one warp of a block; then the packets that are not on chip, threads() apart; then, in
// thread 0 of block 0, the edges.
#pragma once

#include "row_group.h"

namespace pyoffline {
namespace gpu {

constexpr int kStep = 16;  // elements of a thread in one unbroken step

template <class T, class Group>
class RowSlots {
 protected:
  static constexpr int kPer = Elements<T>::kPer, kPackets = Elements<T>::kPackets;
  static constexpr int kLanes = Group::kLanes;
  static constexpr int kPlace =
      (kPackets - 1) * kLanes;  // the bits of a packet's place in its step
  static constexpr int kEdges = 1 << 30, kEnd = kEdges + 2;

  PYOFFLINE_HD RowSlots(Group& group, const RowTask& task, int64_t row)
      : g_(group), task_(task), args_(task.args), row_(row) {}

  // The address of this block's first packet.
  PYOFFLINE_HD const T* cut_row() {
    const int first = g_.block() * packets_of_block(), left = packets() - first;
    count_ = left < 0 ? 0 : left < packets_of_block() ? left : packets_of_block();
    held_ = count_ <= task_.capacity ? count_ : task_.capacity / step() * step();
    if (g_.thread() == 0) load_edges();
    return logits() + begin();
  }

  // Recomputed where they are needed: registers are scarcer than instructions outside the sweeps.
  PYOFFLINE_HD int head() const {
    const int vocab = static_cast<int>(args_.vocab);
    const uintptr_t past = reinterpret_cast<uintptr_t>(logits()) % 16;
    const int head = past ? static_cast<int>((16 - past) / sizeof(T)) : 0;
    return head < vocab ? head : vocab;
  }
  PYOFFLINE_HD int packets() const { return static_cast<unsigned>(args_.vocab - head()) / kPer; }
  // A row that streams has one block; no division by the number of blocks otherwise.
  PYOFFLINE_HD int packets_of_block() const { return g_.blocks() > 1 ? task_.capacity : packets(); }
  // First element of this block's packets.
  PYOFFLINE_HD int begin() const { return head() + g_.block() * packets_of_block() * kPer; }
  PYOFFLINE_HD int tail() const {
    return static_cast<int>(args_.vocab) - head() - packets() * kPer;
  }

  PYOFFLINE_HD const T* logits() const {
    return static_cast<const T*>(args_.logits) + row_ * args_.logits_stride;
  }

  PYOFFLINE_HD void load_edges() {
    const int vocab = static_cast<int>(args_.vocab);
    g_.shared().has_edges = g_.block() == 0 && packets() * kPer != vocab;
    if (!g_.shared().has_edges) return;
    for (int side = 0; side < 2; ++side) {
      const int n = side ? tail() : head(), first = side ? vocab - n : 0;
      Packet packet = lowest_packet<T>();
      T values[kPer];
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (i < n) values[i] = logits()[first + i];
      }
      insert(values, n, &packet);
      g_.shared().edges[side] = packet;
    }
  }

  // The first n elements of a packet, by shifts: an indexed copy would go through local memory.
  PYOFFLINE_HD static void insert(const T* values, int n, Packet* packet) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if (i >= n) continue;
      uint32_t bits = 0;
      memcpy(&bits, values + i, sizeof(T));
      if constexpr (sizeof(T) == 4) {
        packet->words[i] = bits;
      } else {
        const uint32_t keep = i % 2 ? 0x0000ffffu : 0xffff0000u;
        packet->words[i / 2] = (packet->words[i / 2] & keep) | bits << (i % 2 ? 16 : 0);
      }
    }
  }

  // A step that begins before is whole.
  PYOFFLINE_HD int whole() const { return held_ - kPlace; }
  PYOFFLINE_HD int step() const { return kPackets * g_.threads(); }
  PYOFFLINE_HD int first_slot() const { return warp() * kPackets * kLanes + lane(); }

  // This thread's first slot from `index` on, where `index` would be its next one on chip.
  PYOFFLINE_HD int settle(int index) const {
    if (index < held_) return index;
    return held_ < count_ ? held_ + g_.thread() : first_edge();
  }
  PYOFFLINE_HD int first_edge() const {
    return g_.thread() == 0 && g_.shared().has_edges ? kEdges : kEnd;
  }
  // All threads take as many slots beyond the chip, the last one perhaps past count_.
  PYOFFLINE_HD int next(int index) const {
    if (index >= kEdges) return index + 1;
    if (index < held_) {
      const bool is_last = (index & kPlace) == kPlace;
      return settle(index + (is_last ? step() - kPlace : kLanes));
    }
    index += g_.threads();
    return index - g_.thread() < count_ ? index : first_edge();
  }

  // First element and number of elements of a slot.
  PYOFFLINE_HD void span(int index, int* first, int* n) const {
    if (index >= kEdges) {
      *n = index == kEdges ? head() : tail();
      *first = index == kEdges ? 0 : static_cast<int>(args_.vocab) - *n;
      return;
    }
    *first = begin() + index * kPer;
    *n = index < count_ ? kPer : 0;
  }

  // Absent elements are -inf.
  PYOFFLINE_HD Packet fetch(int index) const {
    if (index >= kEdges) return g_.shared().edges[index - kEdges];
    if (index >= count_) return lowest_packet<T>();
    if (index < held_) return load_packet(g_.packets() + index);
    return load_packet(logits() + begin() + int64_t{kPer} * index);
  }

  // Packet j of a whole step.
  PYOFFLINE_HD Packet fetch_whole(int index, int j) const {
    return load_packet(g_.packets() + index + j * kLanes);
  }

  // All copies at once: another block computes meanwhile, and the first sweep is a short one.
  template <bool kGeneral>
  PYOFFLINE_HD void copy_row(const T* source) {
    int index = first_slot();
    Packet* to = g_.packets() + index;
    const T* from = source + int64_t{kPer} * index;
#pragma unroll 1
    for (; !kGeneral && index < whole(); index += step(), to += step(), from += kPer * step()) {
      g_.template copy<0>(to, from);
      g_.template copy<kLanes>(to, from);
      if constexpr (kPackets == 4) {
        g_.template copy<2 * kLanes>(to, from);
        g_.template copy<3 * kLanes>(to, from);
      }
    }
#pragma unroll 1
    for (index = settle(index); index < held_; index = next(index))
      g_.template copy<0>(g_.packets() + index, source + int64_t{kPer} * index);
    g_.wait_copies();
  }

  // The thread that stores element `label`, -1 if it is of another block.
  PYOFFLINE_HD int thread_of(int label) const {
    const int past = label - head();
    if (past < 0 || past >= packets() * kPer) return g_.block() == 0 ? 0 : -1;
    const int index = past / kPer - g_.block() * packets_of_block();
    if (index < 0 || index >= count_) return -1;
    if (index >= held_) return (index - held_) % g_.threads();
    const int in_step = index % step();
    return in_step / (kPackets * kLanes) * kLanes + in_step % kLanes;
  }

  PYOFFLINE_HD int label() const { return static_cast<int>(args_.labels[row_]); }

  PYOFFLINE_HD int warp() const { return static_cast<unsigned>(g_.thread()) / kLanes; }
  PYOFFLINE_HD int lane() const { return static_cast<unsigned>(g_.thread()) % kLanes; }
  PYOFFLINE_HD int warps() const { return g_.threads() / kLanes; }

  Group& g_;
  const RowTask& task_;
  const RowArgs& args_;
  const int64_t row_;
  int count_ = 0;  // packets of this block
  int held_ = 0;   // those in the row memory
};

}  // namespace gpu
}  // namespace pyoffline
