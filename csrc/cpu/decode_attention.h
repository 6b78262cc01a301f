// Attention of one query token per sequence over its rows of the key/value cache: what the op's loops share.
#pragma once

#include "cpu/vec.h"

namespace forge {

struct DecodeShape {
  int64_t q_heads, kv_heads, capacity, d, window;  // window 0: no limit
  float scale, softcap;                            // softcap 0: none
};

template <class T>
struct DecodeAttentionKernels {
  // Task i is key/value head i % kv_heads of sequence i / kv_heads. Query and output [q_heads, d] of sequence s begin at
  // s * q_stride and s * out_stride; keys and values [rows, kv_heads, capacity, d]; scratch: decode_scratch floats.
  void (*run)(const DecodeShape& shape, const T* q, int64_t q_stride, const T* keys, const T* values,
              const int64_t* lengths, T* out, int64_t out_stride, float* scratch, int64_t begin, int64_t end);
};

inline int64_t decode_scratch(const DecodeShape& s) {
  const int64_t group = s.q_heads / s.kv_heads;
  return (group * (2 * s.d + s.capacity) + s.d + 15) / 16 * 16 + 16;
}

namespace FORGE_ISA {

// scores [length] of one query -> probabilities.
inline void to_probabilities(float softcap, float* scores, int64_t length) {
  if (softcap > 0) {
#pragma omp simd
    for (int64_t t = 0; t < length; ++t) scores[t] = softcap * tanh_approx(scores[t] / softcap);
  }
  float highest = scores[0], sum = 0;
#pragma omp simd reduction(max : highest)
  for (int64_t t = 0; t < length; ++t) highest = scores[t] > highest ? scores[t] : highest;
#pragma omp simd reduction(+ : sum)
  for (int64_t t = 0; t < length; ++t) {
    scores[t] = exp_approx(scores[t] - highest);
    sum += scores[t];
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t t = 0; t < length; ++t) scores[t] *= inverse;
}

}  // namespace FORGE_ISA
}  // namespace forge
