// How one row is cut: packets of 16 bytes, a run of them for each block, slots for each thread, and
// the elements at the edges that fill no packet. Where a slot's packet lies: in the block's memory,
// in global memory, or nowhere. Not here: what is computed from them.
#pragma once

#include "row_group.h"

namespace pyoffline {
namespace gpu {

constexpr int kStep = 16;  // elements of a thread in one unbroken step
constexpr int kAhead = 8;  // steps whose copies are in flight

template <class T, class Group>
class RowSlots {
 protected:
  static constexpr int kPer = Elements<T>::kPer, kPackets = Elements<T>::kPackets;

  PYOFFLINE_HD RowSlots(Group& group, const RowTask& task, int64_t row)
      : g_(group), task_(task), args_(task.args), row_(row) {}

  // A thread's packets are its slots: 0 to slots_ - 1 lie threads() apart, and thread 0 of block 0
  // has two more, the elements before the first and after the last whole packet. Sweeps take
  // kPackets slots at a time up to whole_, where every thread holds all of them, then one by one.
  PYOFFLINE_HD void cut_row(bool is_general) {
    const int run = packets_of_block(), first = g_.block() * run, left = packets() - first;
    count_ = left < 0 ? 0 : left < run ? left : run;
    begin_ = head() + first * kPer;
    source_ = reinterpret_cast<const char*>(logits() + begin_);
    slots_ = (count_ + g_.threads() - 1) / g_.threads();
    held_ = count_ <= task_.capacity ? slots_ : task_.capacity / g_.threads();
    const int unbroken = count_ / g_.threads() < held_ ? count_ / g_.threads() : held_;
    whole_ = is_general ? 0 : unbroken / kPackets * kPackets;
    if (g_.thread() == 0) load_edges();
  }

  // Recomputed where they are needed: registers are scarcer than instructions outside the sweeps.
  PYOFFLINE_HD int head() const {
    const int vocab = static_cast<int>(args_.vocab);
    const uintptr_t past = reinterpret_cast<uintptr_t>(logits()) % 16;
    const int head = past ? static_cast<int>((16 - past) / sizeof(T)) : 0;
    return head < vocab ? head : vocab;
  }
  PYOFFLINE_HD int packets() const { return (static_cast<int>(args_.vocab) - head()) / kPer; }
  PYOFFLINE_HD int packets_of_block() const { return (packets() + g_.blocks() - 1) / g_.blocks(); }
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

  PYOFFLINE_HD int end_slot() const {
    return slots_ + (g_.thread() == 0 && g_.shared().has_edges ? 2 : 0);
  }
  PYOFFLINE_HD int packet_index(int slot) const { return slot * g_.threads() + g_.thread(); }

  // First element and number of elements of a slot.
  PYOFFLINE_HD void span(int slot, int* first, int* n) const {
    if (slot >= slots_) {
      *n = slot == slots_ ? head() : tail();
      *first = slot == slots_ ? 0 : static_cast<int>(args_.vocab) - *n;
      return;
    }
    const int index = packet_index(slot);
    *first = begin_ + index * kPer;
    *n = index < count_ ? kPer : 0;
  }

  // Absent elements are -inf.
  PYOFFLINE_HD Packet fetch(int slot) const {
    if (slot >= slots_) return g_.shared().edges[slot - slots_];
    const int index = packet_index(slot);
    if (index >= count_) return lowest_packet<T>();
    if (slot < held_) return load_packet(g_.packets() + index);
    return load_packet(source_ + int64_t{16} * index);
  }

  PYOFFLINE_HD Packet fetch_whole(int slot) const {
    return load_packet(g_.packets() + packet_index(slot));
  }

  // The copies of kPackets slots, as one group.
  PYOFFLINE_HD void copy_slots(int slot) {
    if (slot < held_) {
#pragma unroll
      for (int j = 0; j < kPackets; ++j) {
        const int index = packet_index(slot + j);
        if (slot + j < held_ && index < count_)
          g_.copy(g_.packets() + index, source_ + int64_t{16} * index);
      }
    }
    g_.commit();
  }

  PYOFFLINE_HD int label() const { return static_cast<int>(args_.labels[row_]); }

  PYOFFLINE_HD int warp() const { return g_.thread() / Group::kLanes; }
  PYOFFLINE_HD int lane() const { return g_.thread() % Group::kLanes; }
  PYOFFLINE_HD int warps() const { return (g_.threads() + Group::kLanes - 1) / Group::kLanes; }

  Group& g_;
  const RowTask& task_;
  const RowArgs& args_;
  const int64_t row_;
  int begin_ = 0, count_ = 0;             // first element and number of packets of this block
  int slots_ = 0, held_ = 0, whole_ = 0;  // of this thread; those in the row memory; taken together
  const char* source_ = nullptr;          // this block's first packet
};

}  // namespace gpu
}  // namespace pyoffline
