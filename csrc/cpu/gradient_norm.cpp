// gradient_norm: the square root of the sum of squares of many tensors, in float64. Each block of values is summed by one
// thread and the sums of the blocks are added in their order, so the number of threads does not matter.
#include "adamw_value.h"
#include "cpu/vec.h"

namespace forge {

struct SumOfSquaresKernels {
  double (*of_float)(const void* x, int64_t begin, int64_t end);
  double (*of_bf16)(const void* x, int64_t begin, int64_t end);
  double (*of_half)(const void* x, int64_t begin, int64_t end);
};

namespace FORGE_ISA {
namespace {

template <class T>
double sum_of_squares(const void* values, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(values);
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = begin; i < end; ++i) {
    const double value = static_cast<double>(to_float(x[i]));
    sum += value * value;
  }
  return sum;
}

const RegisterKernels<SumOfSquaresKernels> register_all({&sum_of_squares<float>, &sum_of_squares<bf16>,
                                                         &sum_of_squares<half>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include <cmath>

#include "cpu/value_list.h"

#include "adamw_call.h"

namespace forge {
namespace {

Tensor gradient_norm(const std::vector<Tensor>& gradients_any) {
  std::vector<Tensor> gradients;
  std::vector<FloatType> types;
  ValueList values;
  for (const Tensor& gradient : gradients_any) {
    types.push_back(float_type(gradient, "gradients"));
    gradients.push_back(as_contiguous(gradient));
    values.add(gradient.numel());
  }
  const SumOfSquaresKernels& loops = kernels<SumOfSquaresKernels>();
  std::vector<double> sums(values.blocks());
  values.for_each_block([&](int64_t block, size_t tensor, int64_t begin, int64_t end) {
    const void* x = gradients[tensor].const_data_ptr();
    const FloatType type = types[tensor];
    const auto sum = type == FloatType::kFloat ? loops.of_float : type == FloatType::kHalf ? loops.of_half : loops.of_bf16;
    sums[block] = sum(x, begin, end);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  Tensor norm = new_tensor({}, ScalarType::Float);
  *mutable_data<float>(norm) = static_cast<float>(std::sqrt(total));
  return norm;
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("gradient_norm", TORCH_BOX(&gradient_norm)); }

}  // namespace
}  // namespace forge

#endif
