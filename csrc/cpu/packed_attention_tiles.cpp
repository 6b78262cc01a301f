// The loops of packed_attention in float32; bfloat16 inputs are widened to it where there is no bfloat16 dot product.
// Softmax with a running maximum and sum (Dao et al., arXiv 2205.14135): no matrix of tokens x tokens; the backward
// recomputes the probabilities.
//
// A query tile is kLanes rows of the (token, query head) pairs that share one key/value head; it is kept transposed,
// [d, kLanes], and so are the logits, [keys, kLanes]: softmax then runs down the registers without a single shuffle,
// and keys and values are read as they lie, as the broadcast operand of every matmul.
#include "cpu/packed_attention_lanes.h"
#include "cpu/tile_matmul.h"

namespace forge {
namespace FORGE_ISA {
namespace {

inline int64_t padded(int64_t d) { return (d + kVectorFloats - 1) / kVectorFloats * kVectorFloats; }

// The rows of one head at `count` positions from `first` on -> float32 [count, stride], columns past d zero.
template <class T>
void widen(Heads<const T> x, int64_t head, KeyRows rows, int64_t first, int64_t count, int64_t d, float* y,
           int64_t y_stride) {
  for (int64_t r = 0; r < count; ++r) {
    const T* from = x.data + rows(first + r) * x.token_stride + head * x.head_stride;
    float* to = y + r * y_stride;
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) to[i] = to_float(from[i]);
    for (int64_t i = d; i < y_stride; ++i) to[i] = 0;
  }
}

// Rows of the lanes, times factor -> rows [kLanes, stride]; lanes that do not count are zero.
template <class T>
void gather(const Lanes& lanes, Heads<const T> x, int64_t d, float factor, float* rows, int64_t stride) {
  for (int64_t i = 0; i < lanes.count; ++i) {
    const T* from = x.data + lanes.token[i] * x.token_stride + lanes.head[i] * x.head_stride;
    float* to = rows + i * stride;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) to[j] = to_float(from[j]) * factor;
    for (int64_t j = d; j < stride; ++j) to[j] = 0;
  }
  for (int64_t i = lanes.count * stride; i < kLanes * stride; ++i) rows[i] = 0;
}

// [kLanes, stride] -> [d, kLanes]
inline void transpose_lanes(const float* rows, int64_t stride, int64_t d, float* columns) {
  for (int64_t i = 0; i < kLanes; i += 16) {
    for (int64_t j = 0; j < d; ++j) {
#pragma omp simd
      for (int64_t l = 0; l < 16; ++l) columns[j * kLanes + i + l] = rows[(i + l) * stride + j];
    }
  }
}

// [d, kLanes] times factor [kLanes], rounded -> rows of the lanes in y [tokens, heads, d]. rows: [kLanes, stride] of
// room.
template <class T>
void scatter(const Lanes& lanes, float* columns, const float* factor, int64_t heads, int64_t d, float* rows,
             int64_t stride, T* y) {
  for (int64_t j = 0; j < d; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) columns[j * kLanes + i] *= factor[i];
  }
  for (int64_t j = 0; j < d; ++j) {
    for (int64_t i = 0; i < kLanes; ++i) rows[i * stride + j] = columns[j * kLanes + i];
  }
  for (int64_t i = 0; i < lanes.count; ++i) {
    T* to = y + (lanes.token[i] * heads + lanes.head[i]) * d;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) to[j] = from_float<T>(rows[i * stride + j]);
  }
}

inline void mask(const Lanes& lanes, int64_t from, int64_t keys, float hidden, float* x) {
  for (int64_t j = 0; j < keys; ++j) {
    const int32_t key = static_cast<int32_t>(from + j);
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const float value = x[j * kLanes + i];
      x[j * kLanes + i] = (key >= lanes.first_key[i]) & (key < lanes.key_end[i]) ? value : hidden;
    }
  }
}

// ---- forward ----------------------------------------------------------------------------------------------

// Next keys of the running softmax: logits [keys, kLanes] become probabilities relative to the new maximum; `decay` is
// what earlier sums shrink by.
inline void softmax_step(float* logits, int64_t keys, float* maximum, float* sum, float* decay) {
  float highest[kLanes], part[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) highest[i] = maximum[i];
  for (int64_t j = 0; j < keys; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const float x = logits[j * kLanes + i];
      highest[i] = highest[i] < x ? x : highest[i];
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) {
    decay[i] = highest[i] > maximum[i] ? exp_approx(maximum[i] - highest[i]) : 1.0f;
    maximum[i] = highest[i];
    // A lane that has seen no key yet: subtracting 0 makes its hidden keys weigh 0.
    highest[i] = highest[i] > -__builtin_inff() ? highest[i] : 0.0f;
    part[i] = 0;
  }
  for (int64_t j = 0; j < keys; ++j) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      const float p = exp_approx(logits[j * kLanes + i] - highest[i]);
      logits[j * kLanes + i] = p;
      part[i] += p;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < kLanes; ++i) sum[i] = sum[i] * decay[i] + part[i];
}

inline int64_t packed_size(int64_t, int64_t) { return 0; }

inline int64_t forward_scratch(int64_t d) {
  return kLanes * (padded(d) + 2 * d + kKeys + 3) + 2 * kKeys * padded(d);
}

template <class T>
void forward(const AttentionShape& s, const AttentionTask& t, Heads<const T> q, Heads<const T> k, Heads<const T> v,
             T* out, double* lse, float* scratch) {
  const int64_t d = s.d, stride = padded(d);
  float* rows = scratch;
  float* q_columns = rows + kLanes * stride;
  float* o_columns = q_columns + kLanes * d;
  float* logits = o_columns + kLanes * d;
  float* keys = logits + kLanes * kKeys;
  float* values = keys + kKeys * stride;
  float* maximum = values + kKeys * stride;
  float* sum = maximum + kLanes;
  float* decay = sum + kLanes;
  Lanes lanes;
  for (int64_t row = t.begin * s.group; row < t.end * s.group; row += kLanes) {
    set_lanes(s, t, row, t.end * s.group, lanes);
    gather(lanes, q, d, s.scale, rows, stride);
    transpose_lanes(rows, stride, d, q_columns);
    for (int64_t i = 0; i < kLanes; ++i) {
      maximum[i] = -__builtin_inff();
      sum[i] = 0;
    }
    for (int64_t from = lanes.keys_from; from < lanes.keys_to; from += kKeys) {
      const int64_t count = smaller(kKeys, lanes.keys_to - from);
      widen(k, t.kv_head, {t.spans}, from, count, d, keys, stride);
      widen(v, t.kv_head, {t.spans}, from, count, d, values, stride);
      tile_matmul({keys, stride, 1}, q_columns, kLanes, logits, kLanes, count, kLanes, d, false);
      if (s.softcap > 0) cap(logits, nullptr, count, 1.0f, s.softcap);
      if (from < lanes.full_from || from + count > lanes.full_to) {
        mask(lanes, from, count, -__builtin_inff(), logits);
      }
      softmax_step(logits, count, maximum, sum, decay);
      tile_matmul({values, 1, stride}, logits, kLanes, o_columns, kLanes, d, kLanes, count,
                  from > lanes.keys_from, decay);
    }
    for (int64_t i = 0; i < lanes.count; ++i) {
      lse[lanes.head[i] * s.tokens + lanes.token[i]] = maximum[i] + __builtin_log(static_cast<double>(sum[i]));
    }
    for (int64_t i = 0; i < kLanes; ++i) sum[i] = 1.0f / sum[i];
    scatter(lanes, o_columns, sum, s.q_heads, d, rows, stride, out);
  }
}

// ---- backward ----------------------------------------------------------------------------------------------

inline int64_t backward_scratch(int64_t d, int64_t keys) {
  return kLanes * (2 * padded(d) + 3 * d + 3 * keys + 3) + 4 * keys * padded(d);
}

// D = sum(P * (dout v^T)) / sum(P) of each lane. The usual sum(dout * out) is the same number, but here the rounding
// errors of dout v^T are the ones that it is subtracted from: with one dominant key they cancel.
inline void row_offsets(const float* p, const float* dp, int64_t keys, float* offset) {
  // Few keys at a time in float32: a long sum would round every small term to the size of the dominant one.
  constexpr int64_t kBlock = 16;
  double sum[kLanes] = {}, weighted[kLanes] = {};
  for (int64_t from = 0; from < keys; from += kBlock) {
    const int64_t to = smaller(keys, from + kBlock);
    float block_sum[kLanes] = {}, block_weighted[kLanes] = {};
    for (int64_t j = from; j < to; ++j) {
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) {
        block_sum[i] += p[j * kLanes + i];
        block_weighted[i] += p[j * kLanes + i] * dp[j * kLanes + i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      sum[i] += static_cast<double>(block_sum[i]);
      weighted[i] += static_cast<double>(block_weighted[i]);
    }
  }
  for (int64_t i = 0; i < kLanes; ++i) offset[i] = static_cast<float>(weighted[i] / sum[i]);
}

// The queries of a task: their dq, and what they give to dk and dv. With P the probabilities: dS = P * (dout v^T - D)
// * slope of the cap; dq = scale dS k; dk = scale dS^T q; dv = P^T dout (arXiv 2205.14135, appendix B.4).
template <class T>
void backward(const AttentionShape& s, const AttentionTask& t, Heads<const T> q, Heads<const T> k, Heads<const T> v,
              Heads<const T> dout, const double* lse, T* dq, T* dk, T* dv, float* scratch) {
  const int64_t d = s.d, stride = padded(d);
  const int64_t key_from = first_key(s, t, t.begin), key_count = key_end(s, t, t.end - 1) - key_from;
  float* keys = scratch;
  float* values = keys + key_count * stride;
  float* dkeys = values + key_count * stride;
  float* dvalues = dkeys + key_count * stride;
  float* q_rows = dvalues + key_count * stride;
  float* dout_rows = q_rows + kLanes * stride;
  float* q_columns = dout_rows + kLanes * stride;
  float* dout_columns = q_columns + kLanes * d;
  float* dq_columns = dout_columns + kLanes * d;
  float* offset = dq_columns + kLanes * d;
  float* log_sum = offset + kLanes;
  float* rounding = log_sum + kLanes;
  float* p = rounding + kLanes;  // of all visible keys
  float* ds = p + kLanes * key_count;
  float* slope = ds + kLanes * key_count;
  if (t.partial != nullptr) {
    dkeys = t.partial + key_from * stride;
    dvalues = dkeys + t.partial_rows * stride;
  }
  widen(k, t.kv_head, {t.spans}, key_from, key_count, d, keys, stride);
  widen(v, t.kv_head, {t.spans}, key_from, key_count, d, values, stride);
  for (int64_t i = larger(0, t.zero_from - key_from) * stride; i < key_count * stride; ++i) dkeys[i] = dvalues[i] = 0;

  Lanes lanes;
  for (int64_t row = t.begin * s.group; row < t.end * s.group; row += kLanes) {
    set_lanes(s, t, row, t.end * s.group, lanes);
    gather(lanes, q, d, s.scale, q_rows, stride);
    transpose_lanes(q_rows, stride, d, q_columns);
    gather(lanes, dout, d, 1.0f, dout_rows, stride);
    transpose_lanes(dout_rows, stride, d, dout_columns);
    for (int64_t i = 0; i < kLanes; ++i) {
      // Lanes past the last row have q = dout = 0 and a visible key: they add exact zeros.
      const double exact = i < lanes.count ? lse[lanes.head[i] * s.tokens + lanes.token[i]] : 0.0;
      log_sum[i] = static_cast<float>(exact);
      rounding[i] = static_cast<float>(log_sum[i] - exact);
    }
    for (int64_t from = lanes.keys_from; from < lanes.keys_to; from += kKeys) {
      const int64_t count = smaller(kKeys, lanes.keys_to - from), at = (from - key_from) * stride;
      const int64_t tile = (from - lanes.keys_from) * kLanes;
      tile_matmul({keys + at, stride, 1}, q_columns, kLanes, p + tile, kLanes, count, kLanes, d, false);
      tile_matmul({values + at, stride, 1}, dout_columns, kLanes, ds + tile, kLanes, count, kLanes, d, false);
      if (s.softcap > 0) cap(p + tile, slope + tile, count, 1.0f, s.softcap);
      if (from < lanes.full_from || from + count > lanes.full_to) {
        mask(lanes, from, count, -__builtin_inff(), p + tile);
      }
      for (int64_t j = 0; j < count; ++j) {
        float* x = p + tile + j * kLanes;
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
          // e^(x - lse) = e^(x - log_sum) e^rounding, the last factor to first order.
          const float rounded = exp_approx(x[i] - log_sum[i]);
          x[i] = rounded + rounded * rounding[i];
        }
      }
    }
    row_offsets(p, ds, lanes.keys_to - lanes.keys_from, offset);
    for (int64_t from = lanes.keys_from; from < lanes.keys_to; from += kKeys) {
      const int64_t count = smaller(kKeys, lanes.keys_to - from), at = (from - key_from) * stride;
      const int64_t tile = (from - lanes.keys_from) * kLanes;
      for (int64_t j = 0; j < count; ++j) {
        const float* x = p + tile + j * kLanes;
        float* dx = ds + tile + j * kLanes;
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) dx[i] = x[i] * (dx[i] - offset[i]);
      }
      if (s.softcap > 0) {
#pragma omp simd
        for (int64_t i = tile; i < tile + count * kLanes; ++i) ds[i] *= slope[i];
      }
      tile_matmul({keys + at, 1, stride}, ds + tile, kLanes, dq_columns, kLanes, d, kLanes, count,
                  from > lanes.keys_from);
      tile_matmul({ds + tile, kLanes, 1}, q_rows, stride, dkeys + at, stride, count, stride, lanes.count, true);
      tile_matmul({p + tile, kLanes, 1}, dout_rows, stride, dvalues + at, stride, count, stride, lanes.count, true);
    }
    for (int64_t i = 0; i < kLanes; ++i) offset[i] = s.scale;
    scatter(lanes, dq_columns, offset, s.q_heads, d, q_rows, stride, dq);
  }
  const int64_t kv_heads = s.q_heads / s.group;
  for (int64_t r = larger(0, t.final_from - key_from); r < key_count; ++r) {
    const int64_t to = ((t.origin() + key_from + r) * kv_heads + t.kv_head) * d;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) {
      dk[to + j] = from_float<T>(dkeys[r * stride + j]);
      dv[to + j] = from_float<T>(dvalues[r * stride + j]);
    }
  }
}

inline float partial_dk_factor(const AttentionShape&) { return 1.0f; }  // q is scaled when it is read

template <class T>
constexpr PackedAttentionKernels<T> table{&packed_size,      nullptr,      &forward_scratch,   &forward<T>,
                                          &backward_scratch, &backward<T>, &partial_dk_factor, &sum_partials<T>,
                                          &padded};
const RegisterKernels<PackedAttentionKernels<float>> register_float(table<float>);
const RegisterKernels<PackedAttentionKernels<bf16>> register_bf16(table<bf16>);

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge
