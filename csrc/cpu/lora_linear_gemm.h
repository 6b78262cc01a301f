// lora_linear with the bfloat16 matmul of gemm.h: base and adapter are two terms of one sum, which is rounded once, and
// dropout is a mask of one bit an element that the matmul applies while it packs or adds. What the functions compute is
// said at the top of lora_linear.cpp; a is all adapters' A below one another.
#pragma once

#include "cpu/gemm.h"
#include "cpu/lora_linear.h"

namespace forge::lora_by_gemm {

// The elements of x [.., ..], in their order, that dropout keeps for projection `stream`.
inline Tensor keep_bits(const Dropout& dropout, int64_t elements, size_t stream) {
  const int64_t words = (elements + 63) / 64;
  const Tensor bits = new_tensor({words + 1}, ScalarType::Long);
  torch::stable::parallel_for(0, words + 1, 256, [&](int64_t begin, int64_t end) {
    kernels<GemmKernels>().keep_bits(mutable_data<uint64_t>(bits), begin, end, dropout.seed,
                                     static_cast<uint32_t>(stream), dropout.lowest_kept);
  });
  return bits;
}

inline Tensor transposed_copy(const Tensor& x) {
  const Tensor y = new_tensor({x.size(1), x.size(0)}, ScalarType::BFloat16);
  torch::stable::parallel_for(0, x.size(1), 8, [&](int64_t begin, int64_t end) {
    kernels<GemmKernels>().transpose(data<bf16>(x), x.stride(0), x.size(0), mutable_data<bf16>(y), begin, end);
  });
  return y;
}

inline Tensor shrink(const Tensor& x, const Tensor& a, const std::vector<int64_t>& ranks,
                     const std::vector<double>& scaling, const Dropout& dropout) {
  const Tensor s = new_tensor({x.size(0), a.size(0)}, ScalarType::BFloat16);
  if (!dropout.active && all_equal(scaling)) {
    gemm_linear(s, {{x, a}}, scaling[0]);
    return s;
  }
  int64_t start = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    GemmTerm term = gemm_term(x, transposed(rows_of(a, start, ranks[i])));
    const Tensor bits = dropout.active ? keep_bits(dropout, x.numel(), i) : x;
    if (dropout.active) term.keep_a = data<uint64_t>(bits);
    gemm(columns_of(s, start, ranks[i]), {term}, scaling[i] * dropout.factor());
    start += ranks[i];
  }
  return s;
}

inline Tensors shrink_backward(const Tensor& ds, const Tensor& x, const std::vector<int64_t>& ranks,
                               const std::vector<bool>& wide, const Dropout& dropout) {
  const Tensor ds_t = transposed_copy(ds);
  const auto dtype = [&](size_t i) { return wide[i] ? ScalarType::Float : ScalarType::BFloat16; };
  if (!dropout.active && all_equal(wide)) {
    const Tensor all = new_tensor({ds.size(1), x.size(1)}, dtype(0));
    gemm(all, {gemm_term(ds_t, x)});
    return slices(all, ranks);
  }
  Tensors das;
  int64_t start = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    GemmTerm term = gemm_term(rows_of(ds_t, start, ranks[i]), x);
    const Tensor bits = dropout.active ? keep_bits(dropout, x.numel(), i) : x;
    if (dropout.active) term.keep_b = data<uint64_t>(bits);
    das.push_back(new_tensor({ranks[i], x.size(1)}, dtype(i)));
    gemm(das.back(), {term}, dropout.factor());
    start += ranks[i];
  }
  return das;
}

inline Tensors matmul(const Tensor& x, const Tensor& s, const Tensors& weights, const Tensors& lora_b,
                      const Tensors& biases) {
  Tensors ys;
  int64_t start = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor weight = row_or_column_major(weights[i]), b = in_dtype(lora_b[i], ScalarType::BFloat16);
    const Tensor bias = biases.empty() ? x : as_contiguous(biases[i]);
    ys.push_back(new_tensor({x.size(0), weight.size(0)}, ScalarType::BFloat16));
    gemm_linear(ys.back(), {{x, weight}, {columns_of(s, start, b.size(1)), b}}, 1.0, biases.empty() ? nullptr : &bias);
    start += b.size(1);
  }
  return ys;
}

inline std::tuple<Tensor, Tensor, Tensors> matmul_backward(const Tensors& dys, const Tensor& s, const Tensors& weights,
                                                           const Tensor& a, const Tensors& lora_b,
                                                           const std::vector<double>& scaling, const Dropout& dropout,
                                                           bool need_dx, bool need_db) {
  const Tensor ds = new_tensor({s.size(0), s.size(1)}, ScalarType::BFloat16);
  const Tensor s_t = need_db ? transposed_copy(s) : s;
  Tensors dbs, used;  // used: what the terms point into
  std::vector<GemmTerm> adapters, bases;
  int64_t start = 0;
  for (size_t i = 0; i < dys.size(); ++i) {
    const Tensor b = in_dtype(lora_b[i], ScalarType::BFloat16);
    const int64_t rank = b.size(1);
    gemm(columns_of(ds, start, rank), {gemm_term(dys[i], b)}, scaling[i]);
    if (need_db) {
      dbs.push_back(new_tensor({b.size(0), rank}, lora_b[i].scalar_type()));
      gemm(transposed(dbs.back()), {gemm_term(rows_of(s_t, start, rank), dys[i])});
    }
    if (need_dx) {
      used.push_back(row_or_column_major(weights[i]));
      bases.push_back(gemm_term(dys[i], used.back()));
      if (dropout.active) {
        GemmTerm term = gemm_term(columns_of(ds, start, rank), rows_of(a, start, rank));
        used.push_back(keep_bits(dropout, s.size(0) * a.size(1), i));
        term.keep_product = data<uint64_t>(used.back());
        term.product_scale = static_cast<float>(dropout.factor());
        adapters.push_back(term);
      }
    }
    start += rank;
  }
  if (!need_dx) return {new_tensor({0}, ScalarType::BFloat16), ds, dbs};
  if (!dropout.active) adapters.push_back(gemm_term(ds, a));
  adapters.insert(adapters.end(), bases.begin(), bases.end());
  const Tensor dx = new_tensor({s.size(0), a.size(1)}, ScalarType::BFloat16);
  gemm(dx, adapters);
  return {dx, ds, dbs};
}

}  // namespace forge::lora_by_gemm
