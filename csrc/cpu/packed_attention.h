// What packed_attention.cpp (the op: checks, tasks, threads) and its loops share: packed_attention_tiles.cpp and
// avx512_bf16/packed_attention.cpp.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace forge {

constexpr int64_t kLanes = 64;  // query rows of a tile
constexpr int64_t kKeys = 64;   // keys of a tile

// [tokens, heads, d] with unit stride in d.
template <class T>
struct Heads {
  T* data;
  int64_t token_stride, head_stride;
};

struct AttentionShape {
  int64_t tokens, q_heads, group, d;  // group: query heads of each key/value head
  int64_t window;                     // 0: no limit
  bool causal;
  float scale, softcap;  // softcap 0: none
};

// lse, the logarithm of the sum of exponentials, is float64 [q_heads, tokens]: in the backward its rounding would be a
// factor of a whole row of probabilities.

// Work on one document, the rows [first, last) of the pack, and one key/value head.
struct AttentionTask {
  int64_t first, last;
  int64_t kv_head;
  int64_t begin, end;  // its queries
  float* partial;      // backward: dk, then dv, each [last - first, padded d], of a document of several tasks
  const float* packed = nullptr;  // forward: what pack() made of its keys and values
};

template <class T>
struct PackedAttentionKernels {
  // Keys and values in the order in which the forward's matmuls read them, made once for the tasks that share them.
  // pack is null, and the size 0, where they are read as they are.
  int64_t (*packed_size)(int64_t d, int64_t rows);  // floats
  void (*pack)(const AttentionShape& shape, const AttentionTask& document, Heads<const T> k, Heads<const T> v,
               float* packed);
  int64_t (*forward_scratch)(int64_t d);  // floats
  void (*forward)(const AttentionShape& shape, const AttentionTask& task, Heads<const T> q, Heads<const T> k,
                  Heads<const T> v, T* out, double* lse, float* scratch);
  int64_t (*backward_scratch)(int64_t d, int64_t keys);  // keys: most that a task reads
  void (*backward)(const AttentionShape& shape, const AttentionTask& task, Heads<const T> q, Heads<const T> k,
                   Heads<const T> v, Heads<const T> dout, const double* lse, T* dq, T* dk, T* dv, float* scratch);
  // target[i] = sum over parts of sources[part][i], in their order.
  void (*sum_partials)(const float* const* sources, int64_t parts, int64_t count, T* target);
  int64_t (*padded)(int64_t d);
};

}  // namespace forge
