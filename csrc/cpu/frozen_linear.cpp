// frozen_linear: y_i = x W_i^T (+ bias_i) for projections i of one x, and one dX = sum_i dY_i W_i.
#include "cpu/isa.h"

#if FORGE_ISA_LEVEL == 0

#include "cpu/gemm.h"

namespace forge {
namespace {

using Tensors = std::vector<Tensor>;

// In torch, oneDNN would pack the whole weight on every call: more work than the matmul itself in a step of decoding.
bool takes_gemm(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 && has_bf16_dot_product(); }

Tensors frozen_linear(const Tensor& x_any, const Tensors& weights, const Tensors& biases) {
  FORGE_CHECK(biases.empty() || biases.size() == weights.size(), "bias", biases.size() << " entries",
              weights.size() << ", one per weight, or none");
  const Tensor x = as_contiguous(x_any);
  Tensors ys, kept;
  std::vector<FewRowsSum> few;
  for (size_t i = 0; i < weights.size(); ++i) {
    ys.push_back(new_tensor({x.size(0), weights[i].size(0)}, x.scalar_type()));
    const Tensor bias = biases.empty() ? x : as_contiguous(biases[i]);
    if (takes_gemm(x) && takes_few_rows(x, weights[i])) {
      kept.push_back(bias);
      few.push_back({ys.back(), {{x, weights[i]}}, biases.empty() ? nullptr : data<bf16>(bias)});
      continue;
    }
    if (takes_gemm(x)) {
      gemm_linear(ys.back(), {{x, row_or_column_major(weights[i])}}, 1.0, biases.empty() ? nullptr : &bias);
    } else if (biases.empty()) {
      mm_out(ys.back(), x, transposed(weights[i]));
    } else {
      addmm_out(ys.back(), bias, x, transposed(weights[i]));
    }
  }
  if (!few.empty()) few_rows_linear(few);
  return ys;
}

Tensor frozen_linear_backward(const Tensors& dys_any, const Tensors& weights) {
  FORGE_CHECK(!weights.empty() && dys_any.size() == weights.size(), "dys", dys_any.size() << " entries",
              weights.size() << ", one per weight");
  Tensors kept;
  std::vector<GemmTerm> terms;
  const ScalarType dtype = weights[0].scalar_type();
  const Tensor dx = new_tensor({dys_any[0].size(0), weights[0].size(1)}, dtype);
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor dy = as_contiguous(dys_any[i]);
    if (takes_gemm(dy)) {
      kept.insert(kept.end(), {dy, row_or_column_major(weights[i])});
      terms.push_back(gemm_term(dy, kept.back()));
    } else if (i == 0) {
      mm_out(dx, dy, weights[i]);
    } else {
      addmm_(dx, dy, weights[i]);
    }
  }
  if (!terms.empty()) gemm(dx, terms);
  return dx;
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("frozen_linear", TORCH_BOX(&frozen_linear));
  m.impl("frozen_linear_backward", TORCH_BOX(&frozen_linear_backward));
}

}  // namespace
}  // namespace forge

#endif
