// What packed_attention.cpp (the op), packed_attention_work.h (its tasks) and the loops share: packed_attention_tiles.cpp
// and avx512_bf16/packed_attention.cpp.
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

// The rows of one document among the keys that a document sees. Keys are named by their position: the rows of its
// ancestors, from the root on, then its own.
struct KeySpan {
  int64_t start, end;  // positions
  int64_t row;         // of the pack, at position `start`
  int64_t document;
  const float* packed = nullptr;  // forward: what pack() made of the rows, for one key/value head after the other
};

// Work on queries of one document and one key/value head.
struct AttentionTask {
  const KeySpan* spans;
  int64_t span_count;  // the last one is the document itself
  int64_t begin, end;  // its queries, rows of the pack
  int64_t kv_head = 0;
  // Backward: sums of dk, then of dv, [partial_rows, padded d] each, where other tasks see the same keys; row 0 is
  // position 0. Before position zero_from the task adds to what an earlier one has left there.
  float* partial = nullptr;
  int64_t partial_rows = 0, zero_from = 0;
  int64_t final_from = 0;  // from this position on, dk and dv are complete: the task writes them

  const KeySpan& own() const { return spans[span_count - 1]; }
  int64_t origin() const { return own().row - own().start; }  // a query's row minus its position
};

template <class T>
struct PackedAttentionKernels {
  // Keys and values in the order in which the forward's matmuls read them, made once for the tasks that share them.
  // pack is null, and the size 0, where they are read as they are.
  int64_t (*packed_size)(int64_t d, int64_t rows);  // floats
  void (*pack)(const AttentionShape& shape, const KeySpan& rows, int64_t kv_head, Heads<const T> k, Heads<const T> v,
               float* packed);
  int64_t (*forward_scratch)(int64_t d);  // floats
  void (*forward)(const AttentionShape& shape, const AttentionTask& task, Heads<const T> q, Heads<const T> k,
                  Heads<const T> v, T* out, double* lse, float* scratch);
  int64_t (*backward_scratch)(int64_t d, int64_t keys);  // keys: most that a task reads
  void (*backward)(const AttentionShape& shape, const AttentionTask& task, Heads<const T> q, Heads<const T> k,
                   Heads<const T> v, Heads<const T> dout, const double* lse, T* dq, T* dk, T* dv, float* scratch);
  float (*partial_dk_factor)(const AttentionShape& shape);  // what the partial sums of dk lack
  // target[i] = factor * sum over parts of sources[part][i], in their order.
  void (*sum_partials)(const float* const* sources, int64_t parts, int64_t count, float factor, T* target);
  int64_t (*padded)(int64_t d);
};

}  // namespace forge
