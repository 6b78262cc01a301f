// decode_attention: one query token per sequence over that sequence's rows of the key/value cache, float32 arithmetic.
#include "cpu/decode_attention.h"

namespace forge {
namespace FORGE_ISA {
namespace {

// D: the head dimension where it is a common one, so that the loops over it unroll; else 0.
template <class T, int D>
void run_tasks(const DecodeShape& s, const T* q, int64_t q_stride, const T* keys, const T* values,
               const int64_t* lengths, T* out, int64_t out_stride, float* scratch, int64_t begin, int64_t end) {
  const int64_t d = D > 0 ? D : s.d, group = s.q_heads / s.kv_heads;
  float* queries = scratch;           // [group, d], scaled
  float* sums = queries + group * d;  // [group, d]
  float* row = sums + group * d;      // [d]
  float* scores = row + d;            // [group, capacity]
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sequence = task / s.kv_heads, head = task % s.kv_heads, last = lengths[sequence];
    const int64_t first = s.window > 0 && last > s.window ? last - s.window : 0, length = last - first;
    const T* query = q + sequence * q_stride + head * group * d;
    T* result = out + sequence * out_stride + head * group * d;
    const T* key = keys + ((sequence * s.kv_heads + head) * s.capacity + first) * d;
    const T* value = values + ((sequence * s.kv_heads + head) * s.capacity + first) * d;
#pragma omp simd
    for (int64_t i = 0; i < group * d; ++i) {
      queries[i] = to_float(query[i]) * s.scale;
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
    for (int64_t g = 0; g < group; ++g) to_probabilities(s.softcap, scores + g * s.capacity, length);
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
    for (int64_t i = 0; i < group * d; ++i) result[i] = from_float<T>(sums[i]);
  }
}

template <class T>
void run(const DecodeShape& s, const T* q, int64_t q_stride, const T* keys, const T* values, const int64_t* lengths,
         T* out, int64_t out_stride, float* scratch, int64_t begin, int64_t end) {
  const auto tasks = s.d == 64 ? &run_tasks<T, 64> : s.d == 128 ? &run_tasks<T, 128> : &run_tasks<T, 0>;
  tasks(s, q, q_stride, keys, values, lengths, out, out_stride, scratch, begin, end);
}

const RegisterKernels<DecodeAttentionKernels<float>> register_float({&run<float>});
const RegisterKernels<DecodeAttentionKernels<bf16>> register_bf16({&run<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/decode_tasks.h"
#include "cpu/tensor.h"
#include "cpu/thread_scratch.h"

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
  const Tensor out = new_tensor_like(q);
  const std::vector<int64_t> bounds = balanced_tasks(shape, length, q.size(0));
  dispatch_float_bf16(q, "q", [&]<class T>() {
    run_balanced(bounds, [&](int64_t begin, int64_t end) {
      float* scratch = reinterpret_cast<float*>(thread_scratch(4 * decode_scratch(shape)));
      kernels<DecodeAttentionKernels<T>>().run(shape, data<T>(q), q.size(1) * q.size(2), data<T>(keys),
                                               data<T>(values), length, mutable_data<T>(out), q.size(1) * q.size(2),
                                               scratch, begin, end);
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention)); }

}  // namespace
}  // namespace forge

#endif
