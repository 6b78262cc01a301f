// Many tensors in one launch: a table of them is an argument of the kernel, their values are cut into chunks, and a block
// takes a chunk.
//
// Nothing is uploaded and nothing has to stay alive: gradients lie elsewhere in every step, and a CUDA graph keeps a copy
// of its arguments. A kernel takes 32764 bytes of them, which is hundreds of tensors.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "adamw_value.h"

#if !defined(__CUDACC__)
#include "cpu/vec.h"
#endif

#if defined(__CUDA_ARCH__)
#define FORGE_PRAGMA(text) _Pragma(#text)
#define FORGE_UNROLL_BY(times) FORGE_PRAGMA(unroll times)
#else
#define FORGE_UNROLL_BY(times)
#endif

namespace forge {
namespace tensor_table {

constexpr int kThreads = 256;  // of a block
constexpr int kPack = 4;       // values of a thread at a time: 16 bytes of float32
constexpr int kArgumentBytes = 32764;

#if defined(__CUDACC__)
using Half = __half;
using BFloat16 = __nv_bfloat16;
#else  // the CPU twin, for tests
using Half = forge::half;
using BFloat16 = forge::bf16;
using FORGE_ISA::from_float;
using FORGE_ISA::to_float;

template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T values[kSize];
};
#endif

struct Values {
  float v[kPack];
};

// A GPU cannot read or write a pack just anywhere. The CPU can: so the twin looks whether the GPU could.
FORGE_ALWAYS_INLINE void check_address(const void* x, size_t bytes) {
#if !defined(__CUDA_ARCH__)
  FORGE_CHECK(reinterpret_cast<uintptr_t>(x) % bytes == 0, "address", x, "a multiple of " << bytes);
#endif
}

// Values i to i + count of x; kWhole: count is kPack and the address fits an access to all of them.
template <bool kWhole, class T>
FORGE_ALWAYS_INLINE Values load(const T* x, int64_t i, int count) {
  Values result{};
  if constexpr (kWhole) {
    check_address(x + i, sizeof(Pack<T, kPack>));
    const auto pack = *reinterpret_cast<const Pack<T, kPack>*>(x + i);
    for (int k = 0; k < kPack; ++k) result.v[k] = to_float(pack.values[k]);
  } else {
    for (int k = 0; k < kPack; ++k) {  // not up to count: indices known to the compiler keep the values in registers
      if (k < count) result.v[k] = to_float(x[i + k]);
    }
  }
  return result;
}

template <bool kWhole, class T>
FORGE_ALWAYS_INLINE void store(T* x, int64_t i, int count, const Values& values) {
  if constexpr (kWhole) {
    Pack<T, kPack> pack;
    for (int k = 0; k < kPack; ++k) pack.values[k] = from_float<T>(values.v[k]);
    check_address(x + i, sizeof(pack));
    if constexpr (sizeof(pack) == sizeof(uint64_t)) {  // as a struct it would be stored value by value
      uint64_t word;
      memcpy(&word, &pack, sizeof(word));
      *reinterpret_cast<uint64_t*>(x + i) = word;
    } else {
      *reinterpret_cast<Pack<T, kPack>*>(x + i) = pack;
    }
  } else {
    for (int k = 0; k < kPack; ++k) {
      if (k < count) x[i + k] = from_float<T>(values.v[k]);
    }
  }
}

// The type is the same for a whole block: no threads part here.
template <bool kWhole>
FORGE_ALWAYS_INLINE Values load(const void* x, FloatType type, int64_t i, int count) {
  if (type == FloatType::kBFloat16) return load<kWhole>(static_cast<const BFloat16*>(x), i, count);
  if (type == FloatType::kHalf) return load<kWhole>(static_cast<const Half*>(x), i, count);
  return load<kWhole>(static_cast<const float*>(x), i, count);
}

inline bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % (sizeof(float) * kPack) == 0; }

// Entry has `numel`, the tensor's number of values, and `whole`: all of its addresses are multiples of 16.
template <class Entry, int kChunkValues, int kCapacity>
struct TensorTable {
  static constexpr int64_t kChunk = kChunkValues;

  Entry entries[kCapacity];
  int32_t first_chunk[kCapacity + 1];  // of each entry, and behind the last
  int32_t size;

  // Which entry the chunk belongs to: the last one that begins at it or before, since empty ones begin where the next does.
  FORGE_ALWAYS_INLINE int entry_of(int chunk) const {
    int low = 0, high = size;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // use<kWhole>(load<kWhole>(i, count), i, count) for the packs that a thread has of a chunk of the entry at `index`;
  // kBatch packs are loaded before the first of them is used, so that as many accesses are on their way.
  template <int kBatch, class Load, class Use>
  FORGE_ALWAYS_INLINE void for_packs(int index, int chunk, int thread, const Load& load, const Use& use) const {
    constexpr int kStride = kThreads * kPack;
    const Entry& entry = entries[index];
    const int64_t begin = (chunk - first_chunk[index]) * kChunk;
    const int64_t end = begin + kChunk < entry.numel ? begin + kChunk : entry.numel;
    int64_t i = begin + thread * kPack;
    if (entry.whole) {
      FORGE_UNROLL_BY(1)
      for (; i + (kBatch - 1) * kStride + kPack <= end; i += kBatch * kStride) {
        decltype(load.template operator()<true>(i, kPack)) loaded[kBatch];
        for (int b = 0; b < kBatch; ++b) loaded[b] = load.template operator()<true>(i + b * kStride, kPack);
        for (int b = 0; b < kBatch; ++b) use.template operator()<true>(loaded[b], i + b * kStride, kPack);
      }
    }
    FORGE_UNROLL_BY(1)
    for (; i < end; i += kStride) {
      const int count = end - i < kPack ? static_cast<int>(end - i) : kPack;
      use.template operator()<false>(load.template operator()<false>(i, count), i, count);
    }
  }
};

// Calls launch(table, chunks) for as many tables as the entries need.
template <class Table, class Entry, class F>
void for_each_table(const std::vector<Entry>& entries, const F& launch) {
  constexpr size_t capacity = std::size(Table{}.entries);
  Table table;
  for (size_t first = 0; first < entries.size(); first += capacity) {
    table.size = static_cast<int32_t>(std::min(capacity, entries.size() - first));
    table.first_chunk[0] = 0;
    for (int i = 0; i < table.size; ++i) {
      table.entries[i] = entries[first + i];
      const int64_t chunks = (table.entries[i].numel + Table::kChunk - 1) / Table::kChunk;
      table.first_chunk[i + 1] = table.first_chunk[i] + static_cast<int32_t>(chunks);
    }
    launch(table, table.first_chunk[table.size]);
  }
}

}  // namespace tensor_table
}  // namespace forge
