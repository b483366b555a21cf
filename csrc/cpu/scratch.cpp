// Blocks by mmap, and the idle ones among them; see scratch.h.
#include "scratch.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <vector>

#include "parallel.h"

namespace pyoffline {

namespace {

using Block = Scratch::Block;

// More idle blocks than a call has in use at once, on any number of threads that matters.
constexpr std::size_t kMaxIdle = 256;

std::size_t whole_pages(std::size_t nbytes) {
  static const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  if (nbytes > SIZE_MAX - page) throw std::bad_alloc();
  return std::max<std::size_t>((nbytes + page - 1) / page, 1) * page;
}

Block mapped(std::size_t nbytes) {
  void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  return {data, nbytes};
}

void unmap(const Block& block) { munmap(block.data, block.nbytes); }

// A limit counts mapped memory, used or not: what is idle would be lacking elsewhere.
bool mapping_is_limited() {
  for (const auto which : {RLIMIT_DATA, RLIMIT_AS}) {
    rlimit limit;
    if (getrlimit(which, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY) return true;
  }
  return false;
}

class Keeper {
 public:
  Keeper() { idle_.reserve(kMaxIdle); }

  Block take(std::size_t nbytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    const Block block = found(nbytes);
    in_use_ += block.nbytes;
    return block;
  }

  void give_back(const Block& block) {
    std::lock_guard<std::mutex> lock(mutex_);
    in_use_ -= block.nbytes;
    if (idle_.size() == kMaxIdle) drop_oldest();
    trim(block.nbytes);
    if (in_use_ + block.nbytes > kScratchLimit || mapping_is_limited()) return unmap(block);
#ifdef MADV_FREE
    madvise(block.data, block.nbytes, MADV_FREE);  // advice: a refusal only keeps the pages
#endif
    idle_.push_back(block);
    idle_nbytes_ += block.nbytes;
  }

  std::size_t release() {
    std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t before = idle_nbytes_;
    while (!idle_.empty()) drop_oldest();
    return before;
  }

 private:
  // An idle block of this size up to twice as large; else the largest that is at least half,
  // grown: the steps of a run differ in their tokens, and one block serves them all. Else a new
  // one.
  Block found(std::size_t nbytes) {
    const auto end = idle_.end();
    auto fits = end, grows = end;
    for (auto it = idle_.begin(); it != end; ++it) {
      const bool large = it->nbytes >= nbytes;
      if (large && it->nbytes / 2 <= nbytes && (fits == end || it->nbytes < fits->nbytes))
        fits = it;
      if (!large && it->nbytes >= nbytes / 2 && (grows == end || it->nbytes > grows->nbytes))
        grows = it;
    }
    if (fits != end) return remove(fits);
#ifdef MREMAP_MAYMOVE
    if (grows != end) {
      const Block old = remove(grows);
      trim(nbytes);
      void* data = mremap(old.data, old.nbytes, nbytes, MREMAP_MAYMOVE);
      if (data != MAP_FAILED) return {data, nbytes};
      unmap(old);
    }
#endif
    trim(nbytes);
    try {
      return mapped(nbytes);
    } catch (const std::bad_alloc&) {
      if (idle_.empty()) throw;
    }
    while (!idle_.empty()) drop_oldest();
    return mapped(nbytes);
  }

  // Unmaps idle blocks, the oldest first, until `more` bytes fit below the limit.
  void trim(std::size_t more) {
    while (!idle_.empty() && in_use_ + idle_nbytes_ + more > kScratchLimit) drop_oldest();
  }

  void drop_oldest() { unmap(remove(idle_.begin())); }

  Block remove(std::vector<Block>::iterator it) {
    const Block block = *it;
    idle_.erase(it);
    idle_nbytes_ -= block.nbytes;
    return block;
  }

  std::mutex mutex_;
  std::vector<Block> idle_;  // the oldest first
  std::size_t in_use_ = 0, idle_nbytes_ = 0;
};

// Never destroyed: a tensor may give its block back while the process ends. A forked child keeps
// nothing: its copy of the lock may have been held by a thread that it does not have.
Keeper& keeper() {
  static Keeper* const only = new Keeper;
  return *only;
}

Block taken(std::size_t nbytes) {
  nbytes = whole_pages(nbytes);
  return in_forked_child() ? mapped(nbytes) : keeper().take(nbytes);
}

}  // namespace

Scratch::Scratch(std::size_t nbytes) : block_(taken(nbytes)) {
#ifdef PYOFFLINE_POISON_SCRATCH
  std::memset(block_.data, 0xff, block_.nbytes);  // NaN in every floating-point type
#endif
}

Scratch::~Scratch() { in_forked_child() ? unmap(block_) : keeper().give_back(block_); }

std::size_t release_scratch() { return in_forked_child() ? 0 : keeper().release(); }

}  // namespace pyoffline
