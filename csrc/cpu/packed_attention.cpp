// packed_attention: softmax(mask(cap(scale * q k^T))) v inside each document, float32 arithmetic, by tiles with a running
// maximum and sum (Dao et al., arXiv 2205.14135). No tokens x tokens matrix; the backward recomputes the probabilities.
//
// A query tile is kLanes rows of the (token, query head) pairs that share one key/value head; it is kept transposed,
// [d, kLanes], and so are the logits, [keys, kLanes]: softmax then runs down the registers without a single shuffle, and
// keys and values are read as they lie, as the broadcast operand of every matmul.
#include "cpu/tile_matmul.h"
#include "cpu/vec.h"

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

// lse, the logarithm of the sum of exponentials, is float64 [q_heads, tokens]: its rounding would be a factor of a whole
// row of probabilities in the backward.

// Work on one document, the rows [first, last) of the pack, and one key/value head.
struct AttentionTask {
  int64_t first, last;
  int64_t kv_head;
  int64_t begin, end;  // its queries
  float* partial;      // backward: dk, then dv, each [last - first, padded d], of a document with several tasks, or null
};

template <class T>
struct PackedAttentionKernels {
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

namespace FORGE_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t padded(int64_t d) { return (d + kVectorFloats - 1) / kVectorFloats * kVectorFloats; }

inline int64_t first_key(const AttentionShape& s, const AttentionTask& t, int64_t query) {
  return s.window > 0 ? larger(t.first, query - s.window + 1) : t.first;
}

inline int64_t key_end(const AttentionShape& s, const AttentionTask& t, int64_t query) {
  if (s.causal) return query + 1;
  return s.window > 0 ? smaller(t.last, query + s.window) : t.last;
}

// The rows of a query tile: row r of the document and key/value head is token r / group, query head r % group.
struct Lanes {
  int64_t count;                           // at most kLanes; the other lanes are zero and see whatever is unmasked
  int64_t token[kLanes], head[kLanes];
  int32_t first_key[kLanes], key_end[kLanes];  // visible keys, counted from the document's first row
  int64_t keys_from, keys_to;              // rows of the pack that some lane sees
  int64_t full_from, full_to;              // and those that all lanes see
};

inline void set_lanes(const AttentionShape& s, const AttentionTask& t, int64_t row, int64_t row_end, Lanes& lanes) {
  lanes.count = smaller(kLanes, row_end - row);
  int64_t token = row / s.group, head = row % s.group;
  for (int64_t i = 0; i < kLanes; ++i) {
    lanes.token[i] = token;
    lanes.head[i] = t.kv_head * s.group + head;
    lanes.first_key[i] = static_cast<int32_t>(first_key(s, t, token) - t.first);
    lanes.key_end[i] = static_cast<int32_t>(key_end(s, t, token) - t.first);
    if (++head == s.group) {
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

// [rows, d] -> float32 [rows, stride], columns past d zero.
template <class T>
void widen(const T* x, int64_t x_stride, int64_t rows, int64_t d, float* y, int64_t y_stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = x + r * x_stride;
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

// Caps the logits [keys, kLanes]; with slope, writes d cap / d logit.
inline void cap(float* logits, float* slope, int64_t keys, float softcap) {
  const float inverse = 1.0f / softcap;
#pragma omp simd
  for (int64_t i = 0; i < keys * kLanes; ++i) {
    const float t = tanh_approx(logits[i] * inverse);
    logits[i] = softcap * t;
    if (slope != nullptr) slope[i] = 1.0f - t * t;
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

// ---- forward ------------------------------------------------------------------------------------------------------------

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

inline int64_t forward_scratch(int64_t d) {
  return kLanes * (padded(d) + 2 * d + kKeys + 3) + 2 * kKeys * padded(d);
}

template <class T>
void forward(const AttentionShape& s, const AttentionTask& t, Heads<const T> q, Heads<const T> k, Heads<const T> v, T* out,
             double* lse, float* scratch) {
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
      widen(k.data + from * k.token_stride + t.kv_head * k.head_stride, k.token_stride, count, d, keys, stride);
      widen(v.data + from * v.token_stride + t.kv_head * v.head_stride, v.token_stride, count, d, values, stride);
      tile_matmul({keys, stride, 1}, q_columns, kLanes, logits, kLanes, count, kLanes, d, false);
      if (s.softcap > 0) cap(logits, nullptr, count, s.softcap);
      if (from < lanes.full_from || from + count > lanes.full_to) {
        mask(lanes, from - t.first, count, -__builtin_inff(), logits);
      }
      softmax_step(logits, count, maximum, sum, decay);
      tile_matmul({values, 1, stride}, logits, kLanes, o_columns, kLanes, d, kLanes, count, from > lanes.keys_from, decay);
    }
    for (int64_t i = 0; i < lanes.count; ++i) {
      const float inverse = 1.0f / sum[i];
      T* to = out + (lanes.token[i] * s.q_heads + lanes.head[i]) * d;
      for (int64_t j = 0; j < d; ++j) to[j] = from_float<T>(o_columns[j * kLanes + i] * inverse);
      lse[lanes.head[i] * s.tokens + lanes.token[i]] = maximum[i] + __builtin_log(static_cast<double>(sum[i]));
    }
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------------

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

// Queries [begin, end) of one document and key/value head: their dq, and what they give to dk and dv. With P the
// probabilities: dS = P * (dout v^T - D) * slope of the cap; dq = scale dS k; dk = scale dS^T q; dv = P^T dout
// (arXiv 2205.14135, appendix B.4).
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
    dkeys = t.partial + (key_from - t.first) * stride;
    dvalues = dkeys + (t.last - t.first) * stride;
  }
  widen(k.data + key_from * k.token_stride + t.kv_head * k.head_stride, k.token_stride, key_count, d, keys, stride);
  widen(v.data + key_from * v.token_stride + t.kv_head * v.head_stride, v.token_stride, key_count, d, values, stride);
  for (int64_t i = 0; i < key_count * stride; ++i) dkeys[i] = dvalues[i] = 0;

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
      if (s.softcap > 0) cap(p + tile, slope + tile, count, s.softcap);
      if (from < lanes.full_from || from + count > lanes.full_to) {
        mask(lanes, from - t.first, count, -__builtin_inff(), p + tile);
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
    for (int64_t i = 0; i < lanes.count; ++i) {
      T* to = dq + (lanes.token[i] * s.q_heads + lanes.head[i]) * d;
      for (int64_t j = 0; j < d; ++j) to[j] = from_float<T>(dq_columns[j * kLanes + i] * s.scale);
    }
  }
  if (t.partial != nullptr) return;
  const int64_t kv_heads = s.q_heads / s.group;
  for (int64_t r = 0; r < key_count; ++r) {
    const int64_t to = ((key_from + r) * kv_heads + t.kv_head) * d;
#pragma omp simd
    for (int64_t j = 0; j < d; ++j) {
      dk[to + j] = from_float<T>(dkeys[r * stride + j]);
      dv[to + j] = from_float<T>(dvalues[r * stride + j]);
    }
  }
}

template <class T>
void sum_partials(const float* const* sources, int64_t parts, int64_t count, T* target) {
  for (int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (int64_t part = 0; part < parts; ++part) sum += sources[part][i];
    target[i] = from_float<T>(sum);
  }
}

template <class T>
constexpr PackedAttentionKernels<T> table{&forward_scratch, &forward<T>, &backward_scratch, &backward<T>,
                                          &sum_partials<T>, &padded};
const RegisterKernels<PackedAttentionKernels<float>> register_float(table<float>);
const RegisterKernels<PackedAttentionKernels<bf16>> register_bf16(table<bf16>);

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include <algorithm>
#include <atomic>
#include <optional>

#include "cpu/tensor.h"
#include "data/pack_plan.h"

namespace forge {
namespace {

// Queries of a backward task; a longer document is split into at most kMaxChunks tasks, whose dk and dv are added up in
// their order: the sums do not depend on the number of threads.
constexpr int64_t kChunkQueries = 1024;
constexpr int64_t kMaxChunks = 4;
constexpr int64_t kRowsPerTask = 4 * kLanes;

AttentionShape check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, bool causal,
                            int64_t window, double softcap, double scale) {
  FORGE_CHECK(q.dim() == 3 && q.size(1) > 0 && q.size(2) > 0, "q", "a tensor of " << q.dim() << " dimensions",
              "[tokens, q_heads, d]");
  for (const Tensor* x : {&k, &v}) {
    FORGE_CHECK(x->dim() == 3 && x->size(0) == q.size(0) && x->size(1) == k.size(1) && x->size(2) == q.size(2) &&
                    x->size(1) > 0 && q.size(1) % x->size(1) == 0 && x->scalar_type() == q.scalar_type(),
                (x == &k ? "k" : "v"), "a tensor of " << x->dim() << " dimensions, " << toString(x->scalar_type()),
                "[tokens, kv_heads, d] with tokens, d and dtype of q, kv_heads a divisor of q_heads");
  }
  FORGE_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0, "cu_seqlens",
              toString(cu_seqlens.scalar_type()) << " of " << cu_seqlens.numel() << " elements",
              "int32 [documents + 1]");
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t documents = cu_seqlens.numel() - 1;
  FORGE_CHECK(bounds[0] == 0, "cu_seqlens", bounds[0] << " at index 0", "0");
  for (int64_t i = 0; i < documents; ++i) {
    FORGE_CHECK(bounds[i] <= bounds[i + 1], "cu_seqlens", bounds[i + 1] << " at index " << i + 1,
                "at least its predecessor " << bounds[i]);
  }
  FORGE_CHECK(bounds[documents] <= q.size(0), "cu_seqlens", bounds[documents] << " at its end",
              "at most " << q.size(0) << ", the number of tokens");
  FORGE_CHECK(window >= 0, "window", window, "at least 1, or 0 for none");
  return {q.size(0), q.size(1), q.size(1) / k.size(1), q.size(2), std::min<int64_t>(window, INT32_MAX),
          causal,    static_cast<float>(scale), static_cast<float>(softcap)};
}

Tensor with_unit_stride(const Tensor& x) { return x.stride(2) == 1 ? x : as_contiguous(x); }

template <class T>
Heads<const T> heads(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1)};
}

// Calls run(task, scratch) for all tasks, in their order of start; every thread takes the next one when it is free.
template <class F>
void run_tasks(const std::vector<AttentionTask>& tasks, int64_t scratch_floats, const F& run) {
  const int64_t floats = (scratch_floats + 15) / 16 * 16;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  const Tensor scratch = new_tensor({threads, floats}, ScalarType::Float);
  float* base = mutable_data<float>(scratch);
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) run(tasks[i], base + thread * floats);
  });
}

// Query rows of a plan, which must cover every row of every document once.
std::vector<AttentionTask> planned_tasks(const Tensor& tiles, const int32_t* bounds, int64_t documents) {
  FORGE_CHECK(tiles.scalar_type() == ScalarType::Int && tiles.dim() == 2 && tiles.size(1) == 8 && tiles.is_contiguous(),
              "plan", "tiles of another shape or dtype", "int32 [tiles, 8]");
  std::vector<AttentionTask> tasks;
  std::vector<char> covered(static_cast<size_t>(bounds[documents]), 0);
  const int32_t* tile = data<int32_t>(tiles);
  for (int64_t i = 0; i < tiles.size(0); ++i, tile += 8) {
    const int32_t document = tile[0], begin = tile[1], end = tile[2];
    const bool inside = document >= 0 && document < documents && begin < end && begin >= bounds[document] &&
                        end <= bounds[document + 1];
    FORGE_CHECK(inside, "plan", "rows " << begin << " to " << end << " of document " << document,
                "rows of a document of cu_seqlens: make the plan from the same cu_seqlens");
    for (int64_t row = begin; row < end; ++row) {
      FORGE_CHECK(covered[row] == 0, "plan", "row " << row << " twice", "every row once");
      covered[row] = 1;
    }
    tasks.push_back({bounds[document], bounds[document + 1], 0, begin, end, nullptr});
  }
  const auto missing = std::find(covered.begin(), covered.end(), 0);
  FORGE_CHECK(missing == covered.end(), "plan", "no tile with row " << missing - covered.begin(),
              "every row once: make the plan from the same cu_seqlens");
  return tasks;
}

data_plane::TileOptions visibility(const AttentionShape& s) {
  data_plane::TileOptions options;
  options.causal = s.causal;
  options.window = static_cast<int32_t>(s.window);
  return options;
}

std::vector<AttentionTask> own_tasks(const AttentionShape& s, const int32_t* bounds, int64_t documents) {
  data_plane::TileOptions options = visibility(s);
  options.row_tile = static_cast<int32_t>(std::max<int64_t>(1, kRowsPerTask / s.group));
  std::vector<AttentionTask> tasks;
  for (const data_plane::Tile& tile : data_plane::forward_tiles(bounds, documents, options)) {
    tasks.push_back({bounds[tile.document], bounds[tile.document + 1], 0, tile.row_start, tile.row_end, nullptr});
  }
  return tasks;
}

// The tasks of one head for all; floats_per_row: of one head in partial.
std::vector<AttentionTask> for_each_head(const std::vector<AttentionTask>& tasks, int64_t kv_heads,
                                         int64_t floats_per_row = 0) {
  std::vector<AttentionTask> result;
  result.reserve(tasks.size() * static_cast<size_t>(kv_heads));
  for (AttentionTask task : tasks) {
    for (task.kv_head = 0; task.kv_head < kv_heads; ++task.kv_head) {
      result.push_back(task);
      if (task.partial != nullptr) task.partial += (task.last - task.first) * floats_per_row;
    }
  }
  return result;
}

// Zeroes the rows from `first` on: tokens behind the last document.
template <class T>
void zero_tail(const Tensor& x, int64_t first) {
  const int64_t row = x.size(1) * x.size(2);
  std::fill(mutable_data<T>(x) + first * row, mutable_data<T>(x) + x.size(0) * row, T{});
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                            const Tensor& cu_seqlens_any, const std::optional<Tensor>& tiles, bool causal,
                                            int64_t window, double softcap, double scale) {
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_any);
  const AttentionShape shape = check_inputs(q_any, k_any, v_any, cu_seqlens, causal, window, softcap, scale);
  const Tensor q = with_unit_stride(q_any), k = with_unit_stride(k_any), v = with_unit_stride(v_any);
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t documents = cu_seqlens.numel() - 1;
  const std::vector<AttentionTask> tasks = for_each_head(
      tiles ? planned_tasks(*tiles, bounds, documents) : own_tasks(shape, bounds, documents), k.size(1));
  Tensor out = new_tensor({shape.tokens, shape.q_heads, shape.d}, q.scalar_type());
  Tensor lse = new_zeros({shape.q_heads, shape.tokens}, ScalarType::Double);
  dispatch_float_bf16(q, "q", [&]<class T>() {
    const auto& kernel = kernels<PackedAttentionKernels<T>>();
    run_tasks(tasks, kernel.forward_scratch(shape.d), [&](const AttentionTask& task, float* scratch) {
      kernel.forward(shape, task, heads<T>(q), heads<T>(k), heads<T>(v), mutable_data<T>(out), mutable_data<double>(lse),
                     scratch);
    });
    zero_tail<T>(out, bounds[documents]);
  });
  return {out, lse};
}

// Backward tasks of one head, the longest work first, and the documents that are several of them.
struct SplitDocument {
  int64_t first, last, chunk;  // queries of a task
  float* partials;             // [tasks, kv_heads, 2, last - first, padded d]
};

struct BackwardWork {
  std::vector<AttentionTask> tasks;
  std::vector<SplitDocument> split;
  Tensor partials;
  int64_t most_keys = 0;
};

int64_t chunk_of(int64_t length) { return std::max(kChunkQueries, (length + kMaxChunks - 1) / kMaxChunks); }

BackwardWork backward_work(const AttentionShape& s, const int32_t* bounds, int64_t documents, int64_t padded_d) {
  BackwardWork work;
  const int64_t floats_per_row = s.q_heads / s.group * 2 * padded_d;
  int64_t rows = 0;
  for (int64_t i = 0; i < documents; ++i) {
    const int64_t length = bounds[i + 1] - bounds[i], chunk = chunk_of(length);
    if (length > chunk) rows += (length + chunk - 1) / chunk * length;
  }
  work.partials = new_tensor({rows * floats_per_row}, ScalarType::Float);
  float* partial = mutable_data<float>(work.partials);

  std::vector<std::pair<int64_t, AttentionTask>> weighed;  // visible pairs, task
  const data_plane::TileOptions options = visibility(s);
  for (int64_t i = 0; i < documents; ++i) {
    const int64_t first = bounds[i], last = bounds[i + 1], length = last - first, chunk = chunk_of(length);
    const bool split = length > chunk;
    if (split) work.split.push_back({first, last, chunk, partial});
    for (int64_t begin = 0; begin < length; begin += chunk) {
      const int64_t end = std::min(length, begin + chunk);
      int64_t pairs = 0;
      for (int64_t query = begin; query < end; ++query) {
        const data_plane::detail::Range keys = data_plane::detail::visible_keys(query, length, options);
        pairs += keys.last - keys.first;
      }
      work.most_keys = std::max(work.most_keys, data_plane::detail::visible_keys(end - 1, length, options).last -
                                                    data_plane::detail::visible_keys(begin, length, options).first);
      weighed.push_back({pairs, {first, last, 0, first + begin, first + end, split ? partial : nullptr}});
      if (split) partial += length * floats_per_row;
    }
  }
  std::stable_sort(weighed.begin(), weighed.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [pairs, task] : weighed) work.tasks.push_back(task);
  return work;
}

// dk and dv of a split document: for every key the tasks that hold queries which see it, in their order.
template <class T>
void sum_split(const AttentionShape& s, const SplitDocument& document, int64_t padded_d, T* dk, T* dv) {
  const data_plane::TileOptions options = visibility(s);
  const int64_t length = document.last - document.first, kv_heads = s.q_heads / s.group;
  torch::stable::parallel_for(0, length, 64, [&](int64_t begin, int64_t end) {
    const float* sources[kMaxChunks];
    for (int64_t key = begin; key < end; ++key) {
      const data_plane::detail::Range seen_by = data_plane::detail::visible_queries(key, length, options);
      const int64_t from = seen_by.first / document.chunk, to = (seen_by.last - 1) / document.chunk;
      for (int64_t i = 0; i < 2 * kv_heads; ++i) {  // head i / 2; dk, then dv
        for (int64_t c = from; c <= to; ++c) {
          sources[c - from] = document.partials + ((c * 2 * kv_heads + i) * length + key) * padded_d;
        }
        T* target = (i % 2 == 0 ? dk : dv) + ((document.first + key) * kv_heads + i / 2) * s.d;
        kernels<PackedAttentionKernels<T>>().sum_partials(sources, to - from + 1, s.d, target);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& dout_any, const Tensor& q_any,
                                                             const Tensor& k_any, const Tensor& v_any,
                                                             const Tensor& lse_any,
                                                             const Tensor& cu_seqlens_any, bool causal, int64_t window,
                                                             double softcap, double scale) {
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_any);
  const AttentionShape shape = check_inputs(q_any, k_any, v_any, cu_seqlens, causal, window, softcap, scale);
  FORGE_CHECK(dout_any.dim() == 3 && dout_any.size(0) == shape.tokens && dout_any.size(1) == shape.q_heads &&
                  dout_any.size(2) == shape.d && dout_any.scalar_type() == q_any.scalar_type(),
              "dout", "another shape or dtype", "shape and dtype of q");
  FORGE_CHECK(lse_any.dim() == 2 && lse_any.size(0) == shape.q_heads && lse_any.size(1) == shape.tokens &&
                  lse_any.scalar_type() == ScalarType::Double,
              "lse", "another shape or dtype", "float64 [q_heads, tokens]");
  const Tensor q = with_unit_stride(q_any), k = with_unit_stride(k_any), v = with_unit_stride(v_any);
  const Tensor dout = with_unit_stride(dout_any), lse = as_contiguous(lse_any);
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t documents = cu_seqlens.numel() - 1, kv_heads = k.size(1);
  const ScalarType dtype = q.scalar_type();
  Tensor dq = new_tensor({shape.tokens, shape.q_heads, shape.d}, dtype);
  Tensor dk = new_tensor({shape.tokens, kv_heads, shape.d}, dtype);
  Tensor dv = new_tensor({shape.tokens, kv_heads, shape.d}, dtype);
  dispatch_float_bf16(q, "q", [&]<class T>() {
    const auto& kernel = kernels<PackedAttentionKernels<T>>();
    const int64_t padded_d = kernel.padded(shape.d);
    const BackwardWork work = backward_work(shape, bounds, documents, padded_d);
    run_tasks(for_each_head(work.tasks, kv_heads, 2 * padded_d), kernel.backward_scratch(shape.d, work.most_keys),
              [&](const AttentionTask& task, float* scratch) {
                kernel.backward(shape, task, heads<T>(q), heads<T>(k), heads<T>(v), heads<T>(dout), data<double>(lse),
                                mutable_data<T>(dq), mutable_data<T>(dk), mutable_data<T>(dv), scratch);
              });
    for (const SplitDocument& document : work.split) {
      sum_split(shape, document, padded_d, mutable_data<T>(dk), mutable_data<T>(dv));
    }
    for (const Tensor* gradient : {&dq, &dk, &dv}) zero_tail<T>(*gradient, bounds[documents]);
  });
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

}  // namespace
}  // namespace forge

#endif
