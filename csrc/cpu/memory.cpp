#include "cpu/memory.h"

#if FORGE_ISA_LEVEL == 0

#include <torch/csrc/stable/library.h>

#include <array>
#include <bit>
#include <cstdlib>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "check.h"

namespace forge {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;
constexpr int kSteps = 8;  // sizes per power of two: a block is at most an eighth larger than what was asked for

// The smallest size of the ladder that holds `bytes`.
size_t rounded_size(size_t bytes) {
  const size_t step = std::bit_floor(bytes) / kSteps;
  return (bytes + step - 1) / step * step;
}

void* from_system(size_t bytes) {
  const bool large = bytes >= kLargePage;
  // aligned_alloc wants a multiple of the alignment.
  const size_t alignment = large ? kLargePage : 64, size = (bytes + alignment - 1) / alignment * alignment;
  void* block = std::aligned_alloc(alignment, size);
  if (block == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Before the first touch; where the system has no large pages to give, nothing changes.
  if (large) madvise(block, size, MADV_HUGEPAGE);
#endif
  return block;
}

size_t default_limit() {
#if defined(__linux__)
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGE_SIZE)) / 8;
#else
  return size_t{1} << 30;
#endif
}

size_t configured_limit() {
  const char* text = std::getenv("FORGE_CPU_CACHE_MIB");
  if (text == nullptr || *text == '\0') return default_limit();
  char* end = nullptr;
  const long long mib = std::strtoll(text, &end, 10);
  FORGE_CHECK(*end == '\0' && mib >= 0, "FORGE_CPU_CACHE_MIB", text, "a number of MiB, 0 or more");
  return static_cast<size_t>(mib) << 20;
}

class Cache {
 public:
  void* allocate(size_t bytes) {
    const size_t size = rounded_size(bytes);
    {
      const std::lock_guard lock(mutex_);
      std::vector<void*>& blocks = free_[size];
      if (!blocks.empty()) {
        void* block = blocks.back();  // the last one freed is the likeliest to be in the caches of the CPU
        blocks.pop_back();
        kept_ -= size;
        in_use_.emplace(block, size);
        return block;
      }
    }
    void* block = from_system(size);
    const std::lock_guard lock(mutex_);
    in_use_.emplace(block, size);
    return block;
  }

  void release(void* block) {
    {
      const std::lock_guard lock(mutex_);
      const auto entry = in_use_.find(block);
      const size_t size = entry->second;
      in_use_.erase(entry);
      if (kept_ + size <= limit_) {
        free_[size].push_back(block);
        kept_ += size;
        return;
      }
    }
    std::free(block);
  }

  int64_t empty() {
    std::unordered_map<size_t, std::vector<void*>> blocks;
    int64_t bytes = 0;
    {
      const std::lock_guard lock(mutex_);
      blocks.swap(free_);
      bytes = static_cast<int64_t>(kept_);
      kept_ = 0;
    }
    for (const auto& [size, list] : blocks) {
      for (void* block : list) std::free(block);
    }
    return bytes;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<size_t, std::vector<void*>> free_;  // by size
  std::unordered_map<void*, size_t> in_use_;
  size_t kept_ = 0;
  const size_t limit_ = configured_limit();
};

Cache& cache() {
  static Cache* const instance = new Cache;  // never destroyed: tensors may be freed while the process ends
  return *instance;
}

}  // namespace

void* allocate_block(size_t bytes) { return cache().allocate(bytes); }
void release_block(void* block) { cache().release(block); }
int64_t empty_cache() { return cache().empty(); }

// No tensor argument to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(forge, CompositeExplicitAutograd, m) { m.impl("empty_cache", TORCH_BOX(&empty_cache)); }

}  // namespace forge

#endif
