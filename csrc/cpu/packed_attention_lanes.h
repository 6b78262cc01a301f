// The query tile of packed_attention's loops, whatever they multiply with.
#pragma once

#include "cpu/packed_attention.h"
#include "cpu/vec.h"

namespace forge::FORGE_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Positions of the keys that the query of a row of the pack sees.
inline int64_t first_key(const AttentionShape& s, const AttentionTask& t, int64_t query) {
  return s.window > 0 ? larger(0, query - t.origin() - s.window + 1) : 0;
}

inline int64_t key_end(const AttentionShape& s, const AttentionTask& t, int64_t query) {
  if (s.causal) return query - t.origin() + 1;
  return s.window > 0 ? smaller(t.own().end, query - t.origin() + s.window) : t.own().end;
}

// The rows of the pack that hold the keys of a task, whose positions are asked for in rising order.
struct KeyRows {
  const KeySpan* span;
  int64_t operator()(int64_t position) {
    while (position >= span->end) ++span;
    return span->row + position - span->start;
  }
};

// The rows of a query tile: row r of the document and key/value head is token r / group, query head r % group.
struct Lanes {
  int64_t count;  // at most kLanes; the other lanes see what the last one sees, and their queries are zero
  int64_t token[kLanes], head[kLanes];
  alignas(64) int32_t first_key[kLanes], key_end[kLanes];  // positions of visible keys
  int64_t keys_from, keys_to;                              // those that some lane sees
  int64_t full_from, full_to;                              // and those that all lanes see
};

inline void set_lanes(const AttentionShape& s, const AttentionTask& t, int64_t row, int64_t row_end, Lanes& lanes) {
  lanes.count = smaller(kLanes, row_end - row);
  int64_t token = row / s.group, head = row % s.group;
  for (int64_t i = 0; i < kLanes; ++i) {
    lanes.token[i] = token;
    lanes.head[i] = t.kv_head * s.group + head;
    lanes.first_key[i] = static_cast<int32_t>(first_key(s, t, token));
    lanes.key_end[i] = static_cast<int32_t>(key_end(s, t, token));
    if (i + 1 < lanes.count && ++head == s.group) {
      head = 0;
      ++token;
    }
  }
  const int64_t first = lanes.token[0], last = lanes.token[lanes.count - 1];
  lanes.keys_from = first_key(s, t, first);
  lanes.keys_to = key_end(s, t, last);
  lanes.full_from = first_key(s, t, last);
  lanes.full_to = key_end(s, t, first);
}

// Caps the logits [keys, kLanes], each first multiplied by scale; with slope, writes d cap / d logit.
inline void cap(float* logits, float* slope, int64_t keys, float scale, float softcap) {
  const float factor = scale / softcap;
#pragma omp simd
  for (int64_t i = 0; i < keys * kLanes; ++i) {
    const float t = tanh_approx(logits[i] * factor);
    logits[i] = softcap * t;
    if (slope != nullptr) slope[i] = 1.0f - t * t;
  }
}

template <class T>
void sum_partials(const float* const* sources, int64_t parts, int64_t count, float factor, T* target) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sources[part][i];
    target[i] = from_float<T>(factor * sum);
  }
}

}  // namespace forge::FORGE_ISA
