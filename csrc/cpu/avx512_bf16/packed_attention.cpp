// The loops of packed_attention for bfloat16 on the AVX512-BF16 dot product. The method is that of
// cpu/packed_attention_tiles.cpp: query tiles of kLanes rows kept as columns, keys and values as the broadcast operand.
// What is multiplied are bfloat16 numbers, P and dS among them; all sums, the softmax and dS itself are float32.
//
// Layouts of pairs (two bfloat16 numbers along the depth of a matmul) and the matmuls that read them:
//   keys, values    [keys, d / 2]       logits = K Q^T, dP = V dO^T        (broadcast)
//   key, value pairs [keys / 2, d]      dQ^T += K^T dS^T, O^T += V^T P^T   (broadcast)
//   q, dout columns [d / 2, kLanes]     logits, dP
//   q, dout pairs   [kLanes / 2, d]     dK += dS^T Q, dV += P^T dO
//   P, dS rows      [keys, kLanes / 2]  dV, dK                             (broadcast)
//   P, dS pairs     [keys / 2, kLanes]  O, dQ
#include "cpu/avx512_bf16/attention_tile.h"

namespace forge {
namespace FORGE_ISA {
namespace {

// Even, and whole blocks of kBlockRows. The logits of a tile are 48 KiB and come from L2; fewer keys would cost more
// than that in passes over O.
constexpr int64_t kTileKeys = 192;

// Hands out a task's scratch in whole cache lines.
struct Scratch {
  float* next;
  float* floats(int64_t count) {
    float* room = next;
    next += round_up_to(count, 16);
    return room;
  }
  uint32_t* pairs(int64_t count) { return reinterpret_cast<uint32_t*>(floats(count)); }
};

// ---- forward ----------------------------------------------------------------------------------------------

struct alignas(64) RunningSoftmax {
  float maximum[kLanes];    // of the logits
  float reference[kLanes];  // maximum * factor; 0 for a lane that has seen no key, whose hidden keys then weigh 0
  float sum[kLanes];
  float decay[kLanes];      // what earlier sums shrink by
};

// Next keys, an even number: logits [keys, kLanes] become probabilities relative to the new maximum, as pairs.
void softmax_step(const Interleave& order, const float* logits, int64_t keys, float factor, RunningSoftmax& state,
                  uint32_t* p_pairs) {
  const __m512 scale = _mm512_set1_ps(factor);
  __m512 highest[kLaneVectors], sum[kLaneVectors];
#pragma GCC unroll 4
  for (int64_t n = 0; n < kLaneVectors; ++n) {
    highest[n] = _mm512_load_ps(state.maximum + n * kVector);
    sum[n] = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < keys; ++j) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < kLaneVectors; ++n) {
      highest[n] = _mm512_max_ps(highest[n], _mm512_loadu_ps(logits + j * kLanes + n * kVector));
    }
  }
#pragma GCC unroll 4
  for (int64_t n = 0; n < kLaneVectors; ++n) {
    const __m512 before = _mm512_load_ps(state.maximum + n * kVector);
    _mm512_store_ps(state.maximum + n * kVector, highest[n]);
    const __mmask16 seen = _mm512_cmp_ps_mask(highest[n], _mm512_set1_ps(-kInfinity), _CMP_NEQ_UQ);
    highest[n] = _mm512_maskz_mul_ps(seen, highest[n], scale);
    _mm512_store_ps(state.reference + n * kVector, highest[n]);
    _mm512_store_ps(state.decay + n * kVector, exp2_approx(_mm512_fmsub_ps(before, scale, highest[n])));
  }
  for (int64_t j = 0; j < keys; j += 2) {
#pragma GCC unroll 4
    for (int64_t n = 0; n < kLaneVectors; ++n) {
      const float* x = logits + j * kLanes + n * kVector;
      const __m512 first = exp2_approx(_mm512_fmsub_ps(_mm512_loadu_ps(x), scale, highest[n]));
      const __m512 second = exp2_approx(_mm512_fmsub_ps(_mm512_loadu_ps(x + kLanes), scale, highest[n]));
      sum[n] = _mm512_add_ps(sum[n], _mm512_add_ps(first, second));
      const __m512i both = round_to_bf16(first, second);
      _mm512_storeu_si512(p_pairs + j / 2 * kLanes + n * kVector, _mm512_permutexvar_epi16(order.halves, both));
    }
  }
#pragma GCC unroll 4
  for (int64_t n = 0; n < kLaneVectors; ++n) {
    float* total = state.sum + n * kVector;
    _mm512_store_ps(total, _mm512_fmadd_ps(_mm512_load_ps(total), _mm512_load_ps(state.decay + n * kVector), sum[n]));
  }
}

int64_t packed_size(int64_t d, int64_t rows) { return even(rows) * padded(d); }

void pack(const AttentionShape& s, const KeySpan& span, int64_t kv_head, Heads<const bf16> k, Heads<const bf16> v,
          float* packed) {
  const Interleave order = make_interleave();
  const int64_t count = span.end - span.start;
  uint32_t* keys = reinterpret_cast<uint32_t*>(packed);
  uint32_t* value_pairs = keys + even(count) * padded(s.d) / 2;
  pack_keys(order, k, kv_head, {&span}, span.start, count, s.d, keys, nullptr);
  pack_keys(order, v, kv_head, {&span}, span.start, count, s.d, nullptr, value_pairs);
}

int64_t forward_scratch(int64_t d) {
  return kLanePairs * padded(d) + kLanes * padded(d) + kTileKeys * (kLanes + kLanePairs) + 16;
}

void forward(const AttentionShape& s, const AttentionTask& t, Heads<const bf16> q, Heads<const bf16>,
             Heads<const bf16>, bf16* out, double* lse, float* scratch) {
  const int64_t d = s.d, stride = padded(d), depth = (d + 1) / 2;
  Scratch room{scratch};
  uint32_t* q_columns = room.pairs(kLanePairs * stride);
  uint32_t* p_pairs = room.pairs(kTileKeys * kLanePairs);
  float* logits = room.floats(kTileKeys * kLanes);
  float* o_columns = room.floats(kLanes * stride);
  const Interleave order = make_interleave();
  const float factor = logit_factor(s);
  Lanes lanes;
  const bf16* rows[kLanes];
  for (int64_t row = t.begin * s.group; row < t.end * s.group; row += kLanes) {
    set_lanes(s, t, row, t.end * s.group, lanes);
    find_rows(lanes, q, rows);
    pack_columns(rows, d, s.scale, q_columns);
    prefetch_lanes(s, t, row, {out, s.q_heads * d, d});
    prefetch_lanes(s, t, row + kLanes, q);
    const int64_t vectors = (lanes.count + kVector - 1) / kVector;
    RunningSoftmax state;
    for (int64_t i = 0; i < kLanes; ++i) {
      state.maximum[i] = -kInfinity;
      state.sum[i] = 0;
    }
    Sum sum_of_tiles = Sum::kStore;
    for (int64_t i = 0; i < t.span_count; ++i) {
      const KeySpan& span = t.spans[i];
      if (span.end <= lanes.keys_from) continue;
      const int64_t length = span.end - span.start;
      const uint32_t* keys = reinterpret_cast<const uint32_t*>(span.packed + t.kv_head * packed_size(d, length));
      const uint32_t* value_pairs = keys + even(length) * stride / 2;
      // Pairs of keys start on even rows of a document; a row before the first that is seen is masked.
      const int64_t first = span.start + larger(0, lanes.keys_from - span.start) / 2 * 2;
      const int64_t to = smaller(span.end, lanes.keys_to);
      for (int64_t from = first; from < to; from += kTileKeys) {
        const int64_t visible = smaller(kTileKeys, to - from), count = even(visible), at = from - span.start;
        tile_matmul(RowsOfPairs{keys + at * stride / 2, stride / 2}, {q_columns, kLanes}, {logits, kLanes}, count,
                    vectors, depth, Sum::kStore);
        if (s.softcap > 0) cap(logits, nullptr, count, __builtin_fabsf(s.scale), s.softcap);
        mask_edges(lanes, from, visible, logits);
        softmax_step(order, logits, count, factor, state, p_pairs);
        tile_matmul(ColumnsOfPairs{value_pairs + at / 2 * stride, stride}, {p_pairs, kLanes}, {o_columns, kLanes}, d,
                    vectors, count / 2, sum_of_tiles, state.decay);
        sum_of_tiles = Sum::kScaleAndAdd;
      }
    }
    alignas(64) float log_sum[kLanes];
    for (int64_t i = 0; i < kLanes; i += kVector) {
      const __m512 sum = _mm512_load_ps(state.sum + i);
      const __m512 reference = _mm512_load_ps(state.reference + i);
      _mm512_store_ps(log_sum + i, _mm512_fmadd_ps(reference, _mm512_set1_ps(kLn2), log_approx(sum)));
      _mm512_store_ps(state.sum + i, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
    }
    for (int64_t i = 0; i < lanes.count; ++i) {
      lse[lanes.head[i] * s.tokens + lanes.token[i]] = static_cast<double>(log_sum[i]);
    }
    scatter(order, lanes, o_columns, state.sum, s.q_heads, d, out);
  }
}

// ---- backward ----------------------------------------------------------------------------------------------

// Logits [keys, kLanes] become probabilities, also as rows of pairs; their sum and that of P * dP grow.
void probabilities(float* logits, const float* dp, int64_t keys, float factor, const float* log2_sum, float* sum,
                   float* weighted, uint32_t* p_rows) {
  const __m512 scale = _mm512_set1_ps(factor);
  __m512 total[kLaneVectors], product[kLaneVectors], reference[kLaneVectors];
#pragma GCC unroll 4
  for (int64_t n = 0; n < kLaneVectors; ++n) {
    total[n] = product[n] = _mm512_setzero_ps();
    reference[n] = _mm512_loadu_ps(log2_sum + n * kVector);
  }
  for (int64_t j = 0; j < keys; ++j) {
    __m512 p[kLaneVectors];
#pragma GCC unroll 4
    for (int64_t n = 0; n < kLaneVectors; ++n) {
      float* x = logits + j * kLanes + n * kVector;
      p[n] = exp2_approx(_mm512_fmsub_ps(_mm512_loadu_ps(x), scale, reference[n]));
      _mm512_storeu_ps(x, p[n]);
      total[n] = _mm512_add_ps(total[n], p[n]);
      product[n] = _mm512_fmadd_ps(p[n], _mm512_loadu_ps(dp + j * kLanes + n * kVector), product[n]);
    }
    _mm512_storeu_si512(p_rows + j * kLanePairs, round_to_bf16(p[0], p[1]));
    _mm512_storeu_si512(p_rows + j * kLanePairs + kVector, round_to_bf16(p[2], p[3]));
  }
#pragma GCC unroll 4
  for (int64_t n = 0; n < kLaneVectors; ++n) {
    _mm512_storeu_ps(sum + n * kVector, _mm512_add_ps(_mm512_loadu_ps(sum + n * kVector), total[n]));
    _mm512_storeu_ps(weighted + n * kVector, _mm512_add_ps(_mm512_loadu_ps(weighted + n * kVector), product[n]));
  }
}

// dS = P * (dP - offset) * slope of an even number of keys, as rows and as pairs of keys. slope: null for 1.
void logit_gradients(const Interleave& order, const float* p, const float* dp, const float* slope, int64_t keys,
                     const float* offset, uint32_t* ds_rows, uint32_t* ds_pairs) {
  __m512 shift[kLaneVectors];
#pragma GCC unroll 4
  for (int64_t n = 0; n < kLaneVectors; ++n) shift[n] = _mm512_loadu_ps(offset + n * kVector);
  for (int64_t j = 0; j < keys; j += 2) {
    __m512i rounded[2][kLaneVectors / 2];
#pragma GCC unroll 2
    for (int64_t r = 0; r < 2; ++r) {
      __m512 ds[kLaneVectors];
#pragma GCC unroll 4
      for (int64_t n = 0; n < kLaneVectors; ++n) {
        const int64_t at = (j + r) * kLanes + n * kVector;
        ds[n] = _mm512_mul_ps(_mm512_loadu_ps(p + at), _mm512_sub_ps(_mm512_loadu_ps(dp + at), shift[n]));
        if (slope != nullptr) ds[n] = _mm512_mul_ps(ds[n], _mm512_loadu_ps(slope + at));
      }
#pragma GCC unroll 2
      for (int64_t n = 0; n < kLaneVectors / 2; ++n) {
        rounded[r][n] = round_to_bf16(ds[2 * n], ds[2 * n + 1]);
        _mm512_storeu_si512(ds_rows + (j + r) * kLanePairs + n * kVector, rounded[r][n]);
      }
    }
#pragma GCC unroll 2
    for (int64_t n = 0; n < kLaneVectors / 2; ++n) {
      uint32_t* pairs = ds_pairs + j / 2 * kLanes + 2 * n * kVector;
      _mm512_storeu_si512(pairs, _mm512_permutex2var_epi16(rounded[0][n], order.low, rounded[1][n]));
      _mm512_storeu_si512(pairs + kVector, _mm512_permutex2var_epi16(rounded[0][n], order.high, rounded[1][n]));
    }
  }
}

int64_t backward_scratch(int64_t d, int64_t keys) {
  const int64_t rows = even(keys), stride = padded(d);
  return rows * stride * 3 / 2 + 2 * rows * stride + 4 * kLanePairs * stride + kLanes * stride + 3 * rows * kLanes +
         3 * kTileKeys * kLanePairs + 16;
}

// Gradients [rows, stride] times factor -> rows of x [tokens, heads, d].
void round_gradients(const float* gradients, int64_t rows, int64_t d, float factor, int64_t row_stride, bf16* x) {
  const int64_t stride = padded(d);
  const __m512 scale = _mm512_set1_ps(factor);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < d; j += 32) {
      const float* from = gradients + r * stride + j;
      const __mmask32 inside =
          j + 32 <= d ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << (d - j)) - 1);
      _mm512_mask_storeu_epi16(x + r * row_stride + j, inside,
                               round_to_bf16(_mm512_mul_ps(_mm512_loadu_ps(from), scale),
                                             _mm512_mul_ps(_mm512_loadu_ps(from + 16), scale)));
    }
  }
}

// The formulas: see backward in cpu/packed_attention_tiles.cpp. D = sum(P dP) / sum(P) needs all keys of a query tile
// before the first dS, so P and dP of the tile are kept, in float32.
void backward(const AttentionShape& s, const AttentionTask& t, Heads<const bf16> q, Heads<const bf16> k,
              Heads<const bf16> v, Heads<const bf16> dout, const double* lse, bf16* dq, bf16* dk, bf16* dv,
              float* scratch) {
  const int64_t d = s.d, stride = padded(d), depth = (d + 1) / 2, d_vectors = (d + kVector - 1) / kVector;
  const int64_t key_from = first_key(s, t, t.begin), key_count = key_end(s, t, t.end - 1) - key_from;
  const int64_t key_rows = even(key_count);
  Scratch room{scratch};
  uint32_t* keys = room.pairs(key_rows * stride / 2);
  uint32_t* key_pairs = room.pairs(key_rows * stride / 2);
  uint32_t* values = room.pairs(key_rows * stride / 2);
  uint32_t* q_columns = room.pairs(kLanePairs * stride);
  uint32_t* q_pairs = room.pairs(kLanePairs * stride);
  uint32_t* dout_columns = room.pairs(kLanePairs * stride);
  uint32_t* dout_pairs = room.pairs(kLanePairs * stride);
  uint32_t* p_rows = room.pairs(kTileKeys * kLanePairs);
  uint32_t* ds_rows = room.pairs(kTileKeys * kLanePairs);
  uint32_t* ds_pairs = room.pairs(kTileKeys * kLanePairs);
  float* dq_columns = room.floats(kLanes * stride);
  float* dkeys = room.floats(key_rows * stride);
  float* dvalues = room.floats(key_rows * stride);
  float* p = room.floats(key_rows * kLanes);  // of all visible keys, as dp and slope
  float* dp = room.floats(key_rows * kLanes);
  float* slope = s.softcap > 0 ? room.floats(key_rows * kLanes) : nullptr;
  if (t.partial != nullptr) {
    dkeys = t.partial + key_from * stride;
    dvalues = dkeys + t.partial_rows * stride;
  }
  const Interleave order = make_interleave();
  const float factor = logit_factor(s);
  pack_keys(order, k, t.kv_head, {t.spans}, key_from, key_count, d, keys, key_pairs);
  pack_keys(order, v, t.kv_head, {t.spans}, key_from, key_count, d, values, nullptr);
  for (int64_t i = larger(0, t.zero_from - key_from) * stride; i < key_count * stride; ++i) dkeys[i] = dvalues[i] = 0;

  Lanes lanes;
  const bf16* rows[kLanes];
  alignas(64) float log2_sum[kLanes], sum[kLanes], offset[kLanes];
  for (int64_t row = t.begin * s.group; row < t.end * s.group; row += kLanes) {
    set_lanes(s, t, row, t.end * s.group, lanes);
    find_rows(lanes, q, rows);
    pack_columns(rows, d, s.scale, q_columns);
    for (int64_t i = 0; i < kLanes; i += 2) interleave_rows(order, rows[i], rows[i + 1], d, q_pairs + i / 2 * stride);
    find_rows(lanes, dout, rows);
    pack_columns(rows, d, 1.0f, dout_columns);
    for (int64_t i = 0; i < kLanes; i += 2) {
      interleave_rows(order, rows[i], rows[i + 1], d, dout_pairs + i / 2 * stride);
    }
    prefetch_lanes(s, t, row + kLanes, q);
    prefetch_lanes(s, t, row + kLanes, dout);
    for (int64_t i = 0; i < kLanes; ++i) {
      // Lanes past the last row have q = dout = 0 and a visible key: they add exact zeros.
      const double exact = i < lanes.count ? lse[lanes.head[i] * s.tokens + lanes.token[i]] : 0.0;
      log2_sum[i] = static_cast<float>(exact) * kLog2E;
      sum[i] = offset[i] = 0;
    }
    const int64_t first = key_from + (lanes.keys_from - key_from) / 2 * 2, lane_pairs = (lanes.count + 1) / 2;
    for (int64_t from = first; from < lanes.keys_to; from += kTileKeys) {
      const int64_t visible = smaller(kTileKeys, lanes.keys_to - from), count = even(visible), at = from - key_from;
      const int64_t tile = (from - first) * kLanes;
      tile_matmul(RowsOfPairs{keys + at * stride / 2, stride / 2}, {q_columns, kLanes}, {p + tile, kLanes}, count,
                  kLaneVectors, depth, Sum::kStore);
      tile_matmul(RowsOfPairs{values + at * stride / 2, stride / 2}, {dout_columns, kLanes}, {dp + tile, kLanes}, count,
                  kLaneVectors, depth, Sum::kStore);
      if (slope != nullptr) cap(p + tile, slope + tile, count, __builtin_fabsf(s.scale), s.softcap);
      mask_edges(lanes, from, visible, p + tile);
      probabilities(p + tile, dp + tile, count, factor, log2_sum, sum, offset, p_rows);
      tile_matmul(RowsOfPairs{p_rows, kLanePairs}, {dout_pairs, stride}, {dvalues + at * stride, stride}, visible,
                  d_vectors, lane_pairs, Sum::kAdd);
    }
    for (int64_t i = 0; i < kLanes; ++i) offset[i] /= sum[i];
    for (int64_t from = first; from < lanes.keys_to; from += kTileKeys) {
      const int64_t visible = smaller(kTileKeys, lanes.keys_to - from), count = even(visible), at = from - key_from;
      const int64_t tile = (from - first) * kLanes;
      logit_gradients(order, p + tile, dp + tile, slope == nullptr ? nullptr : slope + tile, count, offset, ds_rows,
                      ds_pairs);
      tile_matmul(ColumnsOfPairs{key_pairs + at / 2 * stride, stride}, {ds_pairs, kLanes}, {dq_columns, kLanes}, d,
                  kLaneVectors, count / 2, from == first ? Sum::kStore : Sum::kAdd);
      tile_matmul(RowsOfPairs{ds_rows, kLanePairs}, {q_pairs, stride}, {dkeys + at * stride, stride}, visible,
                  d_vectors, lane_pairs, Sum::kAdd);
    }
    for (int64_t i = 0; i < kLanes; ++i) offset[i] = s.scale;
    scatter(order, lanes, dq_columns, offset, s.q_heads, d, dq);
  }
  const int64_t done = larger(0, t.final_from - key_from), kv_heads = s.q_heads / s.group;
  const int64_t to = ((t.origin() + key_from + done) * kv_heads + t.kv_head) * d;
  round_gradients(dkeys + done * stride, key_count - done, d, s.scale, kv_heads * d, dk + to);
  round_gradients(dvalues + done * stride, key_count - done, d, 1.0f, kv_heads * d, dv + to);
}

float partial_dk_factor(const AttentionShape& s) { return s.scale; }

const RegisterKernels<PackedAttentionKernels<bf16>> register_bf16({&packed_size, &pack, &forward_scratch, &forward,
                                                                  &backward_scratch, &backward, &partial_dk_factor,
                                                                  &sum_partials<bf16>, &padded});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge
