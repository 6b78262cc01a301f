// AdamW (Loshchilov and Hutter, arXiv 1711.05101): the arithmetic that the CPU loops and the CUDA kernel share.
#pragma once

#include <math.h>

#include <cstdint>

// Always inlined: csrc/cpu compiles this once per instruction set, and no copy of one may serve another.
#if defined(__CUDACC__)
#define FORGE_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
#define FORGE_ALWAYS_INLINE __attribute__((always_inline)) inline
#endif

namespace forge {

enum class FloatType : uint8_t { kFloat, kBFloat16, kHalf };

// One tensor of an update; all of its pointers lead to `numel` consecutive values.
struct AdamWTensor {
  float* parameter;
  float* exp_avg;
  float* exp_avg_sq;
  const void* gradient;
  void* rounded;  // or null
  int64_t numel;
  int32_t index;  // among all tensors, those without a gradient included
  FloatType gradient_type, rounded_type;
};

// What is the same for all values of a tensor.
struct AdamWFactors {
  float gradient;         // clips
  float one_minus_beta1;
  float beta2, one_minus_beta2;
  float eps;
  float decay;            // 1 - rate * weight decay
  float step_size;        // rate / (1 - beta1^step)
  float inverse_root;     // 1 / sqrt(1 - beta2^step)
};

// What is the same for all tensors of an update; the pointers lead to where the tensors are.
struct AdamWOptions {
  double learning_rate;
  const float* learning_rate_tensor;  // instead of learning_rate, or null
  double beta1, beta2, eps;
  const float* norm;  // of the gradients, or null: no clipping
  double max_norm;
  const float* lr_scales;      // [tensors]
  const float* weight_decays;  // [tensors]

  // `step` counts from 1. In double: 1 - beta^step has no digits to lose.
  FORGE_ALWAYS_INLINE AdamWFactors factors(int64_t tensor, float step) const {
    const double given = learning_rate_tensor == nullptr ? learning_rate : static_cast<double>(*learning_rate_tensor);
    const double rate = given * static_cast<double>(lr_scales[tensor]);
    double clip = norm == nullptr ? 1.0 : max_norm / (static_cast<double>(*norm) + 1e-6);  // 1e-6 as in torch
    if (clip > 1.0) clip = 1.0;  // a NaN stays: the caller is to see it in the parameters, too
    AdamWFactors f;
    f.gradient = static_cast<float>(clip);
    f.one_minus_beta1 = static_cast<float>(1.0 - beta1);
    f.beta2 = static_cast<float>(beta2);
    f.one_minus_beta2 = static_cast<float>(1.0 - beta2);
    f.eps = static_cast<float>(eps);
    f.decay = static_cast<float>(1.0 - rate * static_cast<double>(weight_decays[tensor]));
    f.step_size = static_cast<float>(rate / (1.0 - pow(beta1, static_cast<double>(step))));
    f.inverse_root = static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, static_cast<double>(step))));
    return f;
  }
};

FORGE_ALWAYS_INLINE void adamw_value(const AdamWFactors& f, float gradient, float& parameter, float& exp_avg,
                                     float& exp_avg_sq) {
  const float g = gradient * f.gradient;
  exp_avg += f.one_minus_beta1 * (g - exp_avg);
  exp_avg_sq = f.beta2 * exp_avg_sq + f.one_minus_beta2 * g * g;
  const float denominator = sqrtf(exp_avg_sq) * f.inverse_root + f.eps;
  parameter = parameter * f.decay - f.step_size * exp_avg / denominator;
}

}  // namespace forge
