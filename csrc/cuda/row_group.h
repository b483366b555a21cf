// What the row algorithm asks of the threads that share a row, and the memory that they share.
//
// A Group is one to eight blocks (a cluster) of equal size, each with memory of its own that the
// others can read. csrc/cuda/cuda_group.h implements it with hardware clusters, tests/cuda_host
// with threads and barriers on the CPU:
//   kLanes                              threads of a warp, a power of two from 4 on
//   kMostBlocks                         blocks() at most
//   thread() threads() block() blocks() rank and size in the block, rank and number of blocks
//   shuffle_xor(x, mask)                x (float or double) of the lane whose number is lane ^ mask
//   warp_sync()                         barrier of this thread's warp
//   block_sync()                        barrier of this block; sync(): of all blocks. Both order
//                                       memory: what was written before is seen after
//   arrive() wait()                     a barrier of all blocks in two halves, after which none
//                                       reads its peers' memory; orders no writes
//   shared() peer(b)                    this block's Shared, and block b's (read only)
//   packets()                           this block's row memory
//   copy<k>(to, from)                   packet k after `from` into packet k after `to`, some time
//   wait_copies()                       until this thread's copies have arrived
//   publish(to, x)                      to[1] = x, then to[0] = 1, for the CPU to see
// Not here: what is computed (row_algorithm.h), how much memory there is (row_plan.h).
#pragma once

#include "../row_pass.h"
#include "elements.h"
#include "limits.h"

namespace pyoffline {
namespace gpu {

constexpr int kMaxWarps = 32;  // of a block
constexpr int kMaxBlocks = 8;  // of a cluster that every device of compute capability 9 takes
constexpr int kSums = 6;       // ones, tail, s, squares, ut, u

// What the scalar half reads of a row: kept in memory, not in every thread's registers.
struct RowScalars {
  double partial[kSums];  // sums over the cluster, as they were summed
  TokenIn token;
  Coefs coefs;
  float weight, temperature, label_y;
  RowSums sums;
  double sum_u;
  RowStats stats;
};

// One block's shared memory before its part of the row. Each warp has its own slots, each slot is
// written once a row and read by every block after the next sync.
struct Shared {
  Packet edges[2];  // the elements before the first and after the last whole packet of the row
  double sums[kMaxWarps][kSums];
  float max[kMaxWarps];
  RowScalars scalars;    // of thread 0, for its warp
  RowGradient gradient;  // of what the sweep forms: from_pt of w, not of t
  void* dlogits;         // where this block's first packet goes
  int label_thread;      // the thread that stores the label's element, -1: not of this block
  bool is_aligned;       // dlogits takes whole packets
  bool is_silent;        // every coefficient is 0
  bool is_general;       // row_sums.h
  bool wants_gap;
  bool has_edges;  // of thread 0, for itself
};

// The launch's constant half: RowArgs whose terms and extras are stored here.
struct RowTask {
  RowArgs args;
  Term terms[kMaxTerms];
  const float* extras[kMaxExtras];
  const float* scale;  // [1] factor of dlogits beside args.grad_scale, or null
  int64_t* bad_label;  // [2] host memory: becomes (1, label * 2^32 + row) for a label out of range
  int32_t capacity;    // packets of the row memory of one block
  bool wants_gap;      // an output or a term reads the gap
  bool writes_stats;   // any output besides dlogits
  bool is_narrowing;   // dlogits overwrites logits of a wider dtype
};

}  // namespace gpu
}  // namespace pyoffline
