// decode_attention: one query token per sequence over that sequence's rows of the key/value cache, float32 arithmetic.
#include "cpu/vec.h"

namespace forge {

struct DecodeShape {
  int64_t q_heads, kv_heads, capacity, d, window;  // window 0: no limit
  float scale, softcap;                            // softcap 0: none
};

template <class T>
struct DecodeAttentionKernels {
  // Task i is key/value head i % kv_heads of sequence i / kv_heads. q and out [n, q_heads, d]; keys and values
  // [rows, kv_heads, capacity, d]; scratch: floats, decode_scratch of them.
  void (*run)(const DecodeShape& shape, const T* q, const T* keys, const T* values, const int64_t* lengths, T* out,
              float* scratch, int64_t begin, int64_t end);
};

inline int64_t decode_scratch(const DecodeShape& s) {
  const int64_t group = s.q_heads / s.kv_heads;
  return group * (2 * s.d + s.capacity) + s.d;
}

namespace FORGE_ISA {
namespace {

// scores [length] -> their exponentials relative to the largest; returns the sum.
inline float exponentials(float* scores, int64_t length) {
  float highest = scores[0], sum = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t t = 0; t < length; ++t) highest = scores[t] > highest ? scores[t] : highest;
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < length; ++t) {
    scores[t] = exp_approx(scores[t] - highest);
    sum += scores[t];
  }
  return sum;
}

// D: the head dimension where it is a common one, so that the loops over it unroll; else 0.
template <class T, int D>
void run_tasks(const DecodeShape& s, const T* q, const T* keys, const T* values, const int64_t* lengths, T* out,
               float* scratch, int64_t begin, int64_t end) {
  const int64_t d = D > 0 ? D : s.d, group = s.q_heads / s.kv_heads;
  float* queries = scratch;           // [group, d], scaled
  float* sums = queries + group * d;  // [group, d]
  float* row = sums + group * d;      // [d]
  float* scores = row + d;            // [group, capacity]
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sequence = task / s.kv_heads, head = task % s.kv_heads, last = lengths[sequence];
    const int64_t first = s.window > 0 && last > s.window ? last - s.window : 0, length = last - first;
    const int64_t query_row = (sequence * s.q_heads + head * group) * d;
    const T* key = keys + ((sequence * s.kv_heads + head) * s.capacity + first) * d;
    const T* value = values + ((sequence * s.kv_heads + head) * s.capacity + first) * d;
#pragma omp simd
    for (int64_t i = 0; i < group * d; ++i) {
      queries[i] = to_float(q[query_row + i]) * s.scale;
      sums[i] = 0;
    }
    for (int64_t t = 0; t < length; ++t) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) row[i] = to_float(key[t * d + i]);
      for (int64_t g = 0; g < group; ++g) {
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < d; ++i) dot += queries[g * d + i] * row[i];
        scores[g * s.capacity + t] = dot;
      }
    }
    for (int64_t g = 0; g < group; ++g) {
      float* of_query = scores + g * s.capacity;
      if (s.softcap > 0) {
#pragma omp simd
        for (int64_t t = 0; t < length; ++t) of_query[t] = s.softcap * tanh_approx(of_query[t] / s.softcap);
      }
      const float inverse = 1.0f / exponentials(of_query, length);
#pragma omp simd
      for (int64_t t = 0; t < length; ++t) of_query[t] *= inverse;
    }
    for (int64_t t = 0; t < length; ++t) {
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) row[i] = to_float(value[t * d + i]);
      for (int64_t g = 0; g < group; ++g) {
        const float p = scores[g * s.capacity + t];
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) sums[g * d + i] += p * row[i];
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < group * d; ++i) out[query_row + i] = from_float<T>(sums[i]);
  }
}

template <class T>
void run(const DecodeShape& s, const T* q, const T* keys, const T* values, const int64_t* lengths, T* out,
         float* scratch, int64_t begin, int64_t end) {
  const auto tasks = s.d == 64 ? &run_tasks<T, 64> : s.d == 128 ? &run_tasks<T, 128> : &run_tasks<T, 0>;
  tasks(s, q, keys, values, lengths, out, scratch, begin, end);
}

const RegisterKernels<DecodeAttentionKernels<float>> register_float({&run<float>});
const RegisterKernels<DecodeAttentionKernels<bf16>> register_bf16({&run<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/tensor.h"

namespace forge {
namespace {

Tensor decode_attention(const Tensor& q_any, const Tensor& keys, const Tensor& values, const Tensor& lengths_any,
                        int64_t window, double softcap, double scale) {
  const Tensor q = as_contiguous(q_any), lengths = as_contiguous(lengths_any);
  FORGE_CHECK(q.dim() == 3 && q.size(1) > 0, "q", q.dim() << " dimensions", "[sequences, q_heads, d]");
  for (const Tensor* cache : {&keys, &values}) {
    FORGE_CHECK(cache->dim() == 4 && cache->size(0) >= q.size(0) && cache->size(1) > 0 &&
                    q.size(1) % cache->size(1) == 0 && cache->size(1) == keys.size(1) &&
                    cache->size(2) == keys.size(2) && cache->size(3) == q.size(2) && cache->is_contiguous() &&
                    cache->scalar_type() == q.scalar_type(),
                (cache == &keys ? "keys" : "values"), "another shape, dtype or layout",
                "contiguous [at least " << q.size(0) << ", kv_heads, capacity, " << q.size(2) << "], dtype of q");
  }
  FORGE_CHECK(lengths.scalar_type() == ScalarType::Long && lengths.dim() == 1 && lengths.numel() == q.size(0),
              "lengths", toString(lengths.scalar_type()) << " of " << lengths.numel() << " elements",
              "int64 [" << q.size(0) << "]");
  const int64_t* length = data<int64_t>(lengths);
  for (int64_t i = 0; i < q.size(0); ++i) {
    FORGE_CHECK(length[i] > 0 && length[i] <= keys.size(2), "lengths", length[i] << " at index " << i,
                "1 to " << keys.size(2) << ", the capacity of keys");
  }
  const DecodeShape shape{q.size(1), keys.size(1), keys.size(2), q.size(2), window, static_cast<float>(scale),
                          static_cast<float>(softcap)};
  const Tensor out = torch::stable::empty_like(q);
  const int64_t tasks = q.size(0) * shape.kv_heads, threads = torch::stable::get_num_threads();
  const int64_t floats = (decode_scratch(shape) + 15) / 16 * 16, grain = (tasks + threads - 1) / threads;
  const Tensor scratch = new_tensor({threads, floats}, ScalarType::Float);
  dispatch_float_bf16(q, "q", [&]<class T>() {
    torch::stable::parallel_for(0, tasks, std::max<int64_t>(grain, 1), [&](int64_t begin, int64_t end) {
      kernels<DecodeAttentionKernels<T>>().run(shape, data<T>(q), data<T>(keys), data<T>(values), length,
                                               mutable_data<T>(out),
                                               mutable_data<float>(scratch) + begin / grain * floats, begin, end);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention)); }

}  // namespace
}  // namespace forge

#endif
