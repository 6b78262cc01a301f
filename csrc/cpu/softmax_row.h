// One row of logits: softcap, maximum and sums in a single sweep over blocks that stay in the first-level cache.
#pragma once

#include "cpu/vec.h"

namespace forge {
namespace FORGE_ISA {

constexpr int64_t kRowBlock = 512;

// While one lives, results that would be denormal become zero: a probability that small means nothing, and on x86 every
// vector that holds one costs 100 cycles and more.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8000u); }
  ~FlushDenormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

struct RowSums {
  float max = 0;             // of the (softcapped, scaled) logits
  double exp_sum = 0;        // sum of e^(z - max)
  double sum = 0;            // sum of z
  double exp_shift_sum = 0;  // sum of e^(z - max) * (z - max)
};

// z = scale * softcap * tanh(z / softcap); softcap 0: z = scale * z.
inline void cap_block(float* z, int64_t size, float softcap, float scale) {
  if (softcap > 0) {
    const float inverse = 1.0f / softcap, outer = scale * softcap;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) z[i] = outer * tanh_approx(z[i] * inverse);
  } else if (scale != 1.0f) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) z[i] *= scale;
  }
}

// Replaces z by scale * softcap * tanh(z / softcap) (softcap 0: by scale * z) and sums it up. NaN reaches exp_sum.
inline RowSums sum_row(float* z, int64_t vocab, float softcap, float scale) {
  RowSums row;
  for (int64_t begin = 0; begin < vocab; begin += kRowBlock) {
    const int64_t size = vocab - begin < kRowBlock ? vocab - begin : kRowBlock;
    float* block = z + begin;
    cap_block(block, size, softcap, scale);
    float max = block[0];
#pragma omp simd reduction(max : max)
    for (int64_t i = 0; i < size; ++i) max = block[i] > max ? block[i] : max;
    if (begin == 0 || max > row.max) {
      const double shift = begin == 0 ? 0.0 : static_cast<double>(row.max) - static_cast<double>(max);
      const double rescale = begin == 0 ? 0.0 : __builtin_exp(shift);
      row.exp_shift_sum = begin == 0 ? 0.0 : (row.exp_shift_sum + row.exp_sum * shift) * rescale;
      row.exp_sum *= rescale;
      row.max = max;
    }
    const float shift = row.max;
    float exp_sum = 0, sum = 0, exp_shift_sum = 0;
#pragma omp simd reduction(+ : exp_sum, sum, exp_shift_sum)
    for (int64_t i = 0; i < size; ++i) {
      const float shifted = block[i] - shift;
      const float e = exp_nonpositive(shifted);
      exp_sum += e;
      sum += block[i];
      exp_shift_sum += e * shifted;
    }
    row.exp_sum += static_cast<double>(exp_sum);
    row.sum += static_cast<double>(sum);
    row.exp_shift_sum += static_cast<double>(exp_shift_sum);
  }
  return row;
}

// Whether `target` is the first index of the row's maximum.
inline bool is_first_max(const float* z, int64_t target, float max) {
  if (!(z[target] == max)) return false;
  for (int64_t i = 0; i < target; ++i) {
    if (z[i] == max) return false;
  }
  return true;
}

// Caps and scales z as sum_row does and writes f(z[i]) as T over the row itself: T is no wider than float, and a block
// is read before it is written. Returns the capped z[target]. Capping is a pass of its own, so that z - max is exactly
// what it was in sum_row.
template <class T, class F>
inline float rewrite_row(float* z, int64_t vocab, int64_t target, float softcap, float scale, const F& f) {
  T* out = reinterpret_cast<T*>(z);
  float values[kRowBlock];
  float at_target = 0;
  for (int64_t begin = 0; begin < vocab; begin += kRowBlock) {
    const int64_t size = vocab - begin < kRowBlock ? vocab - begin : kRowBlock;
    cap_block(z + begin, size, softcap, scale);
    if (target >= begin && target < begin + size) at_target = z[target];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) values[i] = f(z[begin + i]);
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) out[begin + i] = from_float<T>(values[i]);
  }
  return at_target;
}

}  // namespace FORGE_ISA
}  // namespace forge
