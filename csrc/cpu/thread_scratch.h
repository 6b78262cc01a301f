// Memory of a thread for the length of one task. Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace forge {

// At least this many bytes, 64-byte aligned; the contents are whatever an earlier task left. Kept from call to call:
// fresh pages cost more than a small matmul.
inline char* thread_scratch(int64_t bytes) {
  static thread_local std::unique_ptr<char[]> memory;
  static thread_local int64_t size = 0;
  if (size < bytes + 64) {
    memory = std::make_unique_for_overwrite<char[]>(static_cast<size_t>(bytes + 64));
    size = bytes + 64;
  }
  return memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
}

}  // namespace forge
