// The arguments of adamw_, checked and without torch, for both devices. Include after cpu/tensor.h or
// cuda/tensor.h.
#pragma once

#include <optional>
#include <vector>

#include "adamw_value.h"

namespace forge {

inline FloatType float_type(const Tensor& x, const char* argument) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return FloatType::kFloat;
    case ScalarType::BFloat16:
      return FloatType::kBFloat16;
    case ScalarType::Half:
      return FloatType::kHalf;
    default:
      FORGE_CHECK(false, argument, toString(x.scalar_type()), "float32, bfloat16 or float16");
  }
  return FloatType::kFloat;
}

inline void check_state(const Tensor& x, const char* argument, int64_t numel, ScalarType dtype) {
  FORGE_CHECK(x.numel() == numel && x.scalar_type() == dtype && x.is_contiguous(), argument,
              x.numel() << " values of " << toString(x.scalar_type())
                        << (x.is_contiguous() ? "" : ", not contiguous"),
              numel << " of " << toString(dtype) << ", contiguous");
}

struct AdamWCall {
  std::vector<AdamWTensor> tensors;  // those that have a gradient
  AdamWOptions options;
  Tensor steps;                   // [tensors], updates before this one
  std::vector<Tensor> gradients;  // contiguous; keeps copies alive
};

// The op adamw_: kRun makes the update. A tensor of bools stands for a gradient or a rounded tensor that is not there.
template <void (*kRun)(const AdamWCall&)>
void adamw_(const std::vector<Tensor>& parameters, const std::vector<Tensor>& gradients,
            const std::vector<Tensor>& exp_avg, const std::vector<Tensor>& exp_avg_sq, const Tensor& steps,
            const std::vector<Tensor>& rounded, const Tensor& lr_scales, const Tensor& weight_decays,
            double learning_rate, std::optional<Tensor> learning_rate_tensor, double beta1, double beta2, double eps,
            std::optional<Tensor> norm, double max_norm) {
  const size_t count = parameters.size();
  FORGE_CHECK(gradients.size() == count && exp_avg.size() == count && exp_avg_sq.size() == count,
              "gradients, exp_avg, exp_avg_sq",
              gradients.size() << ", " << exp_avg.size() << " and " << exp_avg_sq.size() << " tensors",
              "one per parameter, " << count);
  FORGE_CHECK(rounded.empty() || rounded.size() == count, "rounded", rounded.size() << " tensors",
              "none, or one per parameter, " << count);
  for (const auto& [x, name] : {std::pair{&steps, "steps"}, {&lr_scales, "lr_scales"}, {&weight_decays, "weight_decays"}}) {
    check_state(*x, name, static_cast<int64_t>(count), ScalarType::Float);
  }
  if (learning_rate_tensor) check_state(*learning_rate_tensor, "learning_rate", 1, ScalarType::Float);
  if (norm) check_state(*norm, "norm", 1, ScalarType::Float);

  AdamWCall call{{}, {learning_rate,
                  learning_rate_tensor ? data<float>(*learning_rate_tensor) : nullptr,
                  beta1,
                  beta2,
                  eps,
                  norm ? data<float>(*norm) : nullptr,
                  max_norm,
                  data<float>(lr_scales),
                  data<float>(weight_decays)},
                 steps,
                 {}};
  call.tensors.reserve(count);
  call.gradients.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    if (gradients[i].scalar_type() == ScalarType::Bool) continue;
    const int64_t numel = parameters[i].numel();
    FORGE_CHECK(gradients[i].numel() == numel, "gradients", gradients[i].numel() << " values at index " << i,
                numel << " as the parameter");
    check_state(parameters[i], "parameters", numel, ScalarType::Float);
    check_state(exp_avg[i], "exp_avg", numel, ScalarType::Float);
    check_state(exp_avg_sq[i], "exp_avg_sq", numel, ScalarType::Float);
    call.gradients.push_back(as_contiguous(gradients[i]));
    AdamWTensor t{};
    t.parameter = mutable_data<float>(parameters[i]);
    t.exp_avg = mutable_data<float>(exp_avg[i]);
    t.exp_avg_sq = mutable_data<float>(exp_avg_sq[i]);
    t.gradient = call.gradients.back().const_data_ptr();
    t.numel = numel;
    t.index = static_cast<int32_t>(i);
    t.gradient_type = float_type(gradients[i], "gradients");
    if (!rounded.empty() && rounded[i].scalar_type() != ScalarType::Bool) {
      check_state(rounded[i], "rounded", numel, rounded[i].scalar_type());
      t.rounded = rounded[i].mutable_data_ptr();
      t.rounded_type = float_type(rounded[i], "rounded");
      FORGE_CHECK(t.rounded_type != FloatType::kFloat, "rounded", "float32", "bfloat16 or float16");
    }
    call.tensors.push_back(t);
  }
  kRun(call);
}

}  // namespace forge
