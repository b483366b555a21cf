// Memory that outlives the call: the chunk of logits, the accumulator of dweight, panels, and large
// results (dweight) once the user has dropped them.
//
// A training step needs the same hundreds of MiB every time, and fresh from the system each page of
// 4 KiB costs a fault (1.2 us on a virtual machine: 4 % of a call for its scratch, 2 to 3 % for
// dweight, 2026-11-28). So a block that is given back stays mapped, marked MADV_FREE: the system
// may take its pages whenever memory is short, and until it does they are there without a fault.
// Under a limit on mapped memory (ulimit -d, -v) nothing is kept. No huge pages: where memory is
// fragmented their first touch stalls on compaction (0.4 s for 272 MiB, against 0.05 s in small
// pages, 2026-11-21). A new block holds anything.
#pragma once

#include <cstddef>

namespace pyoffline {

// Mapped blocks, those in use included, stay below this as long as the idle ones suffice to keep
// them there: 512 MiB of logits, the accumulator and the bf16 gradient of a head of 128,256 x 2,560
// fit.
constexpr std::size_t kScratchLimit = std::size_t{3} << 30;

// A block of at least nbytes, page-aligned, for the life of the object. Throws std::bad_alloc.
class Scratch {
 public:
  explicit Scratch(std::size_t nbytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* get() const { return block_.data; }

  struct Block {
    void* data;
    std::size_t nbytes;
  };

 private:
  Block block_;
};

// Unmaps the idle blocks; returns their bytes.
std::size_t release_scratch();

}  // namespace pyoffline
