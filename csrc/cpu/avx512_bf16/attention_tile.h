// The query tile of packed_attention on bfloat16 pairs: packing of its rows and keys, its mask, and the way back.
#pragma once

#include "cpu/avx512_bf16/tile_matmul.h"
#include "cpu/avx512_bf16/tile_pack.h"
#include "cpu/packed_attention_lanes.h"

namespace forge::FORGE_ISA {

constexpr int64_t kLaneVectors = kLanes / kVector;
constexpr int64_t kLanePairs = kLanes / 2;
constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.69314718055994531f;
constexpr int64_t kAhead = 16;  // rows
constexpr float kInfinity = __builtin_inff();

inline int64_t even(int64_t n) { return (n + 1) / 2 * 2; }
inline int64_t padded(int64_t d) { return round_up_to(d, 32); }

// Rows of one head lie too far apart for the CPU's own prefetcher.
inline void prefetch_rows(const bf16* x, int64_t rows, int64_t row_stride, int64_t d) {
  for (int64_t r = 0; r < rows; ++r) {
    const bf16* row = x + r * row_stride;
    for (int64_t j = 0; j < d; j += 32) _mm_prefetch(reinterpret_cast<const char*>(row + j), _MM_HINT_T1);
  }
}

// The rows of the query tile that starts at `row`: to be gathered when the one before it is done, or written then.
inline void prefetch_lanes(const AttentionShape& s, const AttentionTask& t, int64_t row, Heads<const bf16> x) {
  const int64_t last = smaller(t.end, (row + kLanes - 1) / s.group + 1);
  for (int64_t token = row / s.group; token < last; ++token) {
    prefetch_rows(x.data + token * x.token_stride + t.kv_head * s.group * x.head_stride, s.group, x.head_stride, s.d);
  }
}

// The rows of one head at `count` positions from `from` on, as [keys, d / 2] and as [keys / 2, d]; either may be null. A
// row of zeros follows an odd last one.
inline void pack_keys(const Interleave& order, Heads<const bf16> x, int64_t kv_head, KeyRows key_rows, int64_t from,
                      int64_t count, int64_t d, uint32_t* rows, uint32_t* pairs) {
  const int64_t stride = padded(d);
  x.data += kv_head * x.head_stride;
  for (int64_t i = 0; i < count; i += 2) {
    const bf16* first = x.data + key_rows(from + i) * x.token_stride;
    prefetch_rows(first + kAhead * x.token_stride, 2, x.token_stride, d);
    const bf16* second = i + 1 < count ? x.data + key_rows(from + i + 1) * x.token_stride : nullptr;
    if (rows != nullptr) {
      copy_row(first, d, rows + i * stride / 2);
      copy_row(second, d, rows + (i + 1) * stride / 2);
    }
    if (pairs != nullptr) interleave_rows(order, first, second, d, pairs + i / 2 * stride);
  }
}

// Where each lane's row of x [tokens, heads, d] lies; null past the last lane that counts.
inline void find_rows(const Lanes& lanes, Heads<const bf16> x, const bf16** rows) {
  for (int64_t i = 0; i < kLanes; ++i) {
    rows[i] = i < lanes.count ? x.data + lanes.token[i] * x.token_stride + lanes.head[i] * x.head_stride : nullptr;
  }
}

// Rows of the lanes -> [d / 2, kLanes]. The sign of the scale goes in here: its magnitude is applied to the float32
// logits, but a negative one there would turn their maximum into a minimum.
inline void pack_columns(const bf16* const* rows, int64_t d, float scale, uint32_t* columns) {
  static const bf16* const zeros[kLanes] = {};
  const uint32_t sign_bits = scale < 0 ? 0x80008000u : 0u;
  for (int64_t i = 0; i < kLanes; i += kVector) {
    transpose_pairs(scale == 0 ? zeros : rows + i, d, sign_bits, columns + i, kLanes);
  }
}

// [d, kLanes] times factor [kLanes] -> rows of the lanes in y [tokens, heads, d].
inline void scatter(const Interleave& order, const Lanes& lanes, const float* columns, const float* factor,
                    int64_t heads, int64_t d, bf16* y) {
  bf16* rows[kLanes];
  for (int64_t i = 0; i < lanes.count; ++i) rows[i] = y + (lanes.token[i] * heads + lanes.head[i]) * d;
  for (int64_t i = 0; i < lanes.count; i += kVector) {
    scatter_columns(order, columns + i, kLanes, factor + i, d, smaller(kVector, lanes.count - i), rows + i);
  }
}

// What turns the products q k into logits to the base of 2; with a softcap, cap() has applied the scale before.
inline float logit_factor(const AttentionShape& s) {
  if (s.softcap > 0 || s.scale == 0) return kLog2E;
  return __builtin_fabsf(s.scale) * kLog2E;
}

// Hides what a lane must not see in the logits [keys, kLanes] of the positions from `key` on.
inline void mask(const Lanes& lanes, int64_t key, int64_t keys, float* logits) {
  const __m512 hidden = _mm512_set1_ps(-kInfinity);
  for (int64_t j = 0; j < keys; ++j) {
    const __m512i row = _mm512_set1_epi32(static_cast<int>(key + j));
#pragma GCC unroll 4
    for (int64_t n = 0; n < kLaneVectors; ++n) {
      const __mmask16 late = _mm512_cmpgt_epi32_mask(_mm512_load_si512(lanes.first_key + n * kVector), row);
      const __mmask16 early = _mm512_cmple_epi32_mask(_mm512_load_si512(lanes.key_end + n * kVector), row);
      _mm512_mask_storeu_ps(logits + j * kLanes + n * kVector, late | early, hidden);
    }
  }
}

// Only the rows that some lane does not see; and the one that makes an odd number of keys even.
inline void mask_edges(const Lanes& lanes, int64_t from, int64_t keys, float* logits) {
  const int64_t head = larger(0, smaller(keys, lanes.full_from - from));
  const int64_t tail = larger(head, smaller(keys, lanes.full_to - from));
  mask(lanes, from, head, logits);
  mask(lanes, from + tail, keys - tail, logits + tail * kLanes);
  if (keys % 2 == 1) {
    for (int64_t i = 0; i < kLanes; ++i) logits[keys * kLanes + i] = -kInfinity;
  }
}

}  // namespace forge::FORGE_ISA
