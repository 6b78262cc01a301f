// adamw_: many tensors in one pass. A value's gradient, parameter and moments are read once, and what changes is written
// once, the parameter's rounding to lower precision included. csrc/adamw_value.h has the formula.
#include "adamw_value.h"
#include "cpu/vec.h"

namespace forge {

struct AdamWKernels {
  void (*update)(const AdamWTensor& tensor, const AdamWFactors& factors, int64_t begin, int64_t end);
};

namespace FORGE_ISA {
namespace {

// A parameter without a rounded copy has Rounded = float.
template <class Gradient, class Rounded>
void update_as(const AdamWTensor& tensor, const AdamWFactors& factors, int64_t begin, int64_t end) {
  const AdamWFactors f = factors;
  float *parameter = tensor.parameter, *exp_avg = tensor.exp_avg, *exp_avg_sq = tensor.exp_avg_sq;
  const Gradient* gradient = static_cast<const Gradient*>(tensor.gradient);
  Rounded* rounded = static_cast<Rounded*>(tensor.rounded);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    float p = parameter[i], m = exp_avg[i], v = exp_avg_sq[i];
    adamw_value(f, to_float(gradient[i]), p, m, v);
    parameter[i] = p;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    if constexpr (sizeof(Rounded) < sizeof(float)) rounded[i] = from_float<Rounded>(p);
  }
}

template <class Gradient>
void update_from(const AdamWTensor& tensor, const AdamWFactors& factors, int64_t begin, int64_t end) {
  if (tensor.rounded == nullptr) {
    update_as<Gradient, float>(tensor, factors, begin, end);
  } else if (tensor.rounded_type == FloatType::kHalf) {
    update_as<Gradient, half>(tensor, factors, begin, end);
  } else {
    update_as<Gradient, bf16>(tensor, factors, begin, end);
  }
}

void update(const AdamWTensor& tensor, const AdamWFactors& factors, int64_t begin, int64_t end) {
  if (tensor.gradient_type == FloatType::kFloat) {
    update_from<float>(tensor, factors, begin, end);
  } else if (tensor.gradient_type == FloatType::kHalf) {
    update_from<half>(tensor, factors, begin, end);
  } else {
    update_from<bf16>(tensor, factors, begin, end);
  }
}

const RegisterKernels<AdamWKernels> register_all({&update});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/value_list.h"

#include "adamw_call.h"

namespace forge {
namespace {

void update(const AdamWCall& call) {
  float* steps = mutable_data<float>(call.steps);
  ValueList values;
  std::vector<AdamWFactors> factors;
  for (const AdamWTensor& tensor : call.tensors) {
    values.add(tensor.numel);
    factors.push_back(call.options.factors(tensor.index, ++steps[tensor.index]));
  }
  const AdamWKernels& loops = kernels<AdamWKernels>();
  values.for_each_block([&](int64_t, size_t tensor, int64_t begin, int64_t end) {
    loops.update(call.tensors[tensor], factors[tensor], begin, end);
  });
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("adamw_", TORCH_BOX(&adamw_<&update>)); }

}  // namespace
}  // namespace forge

#endif
