// lora_linear through torch's matmuls, for any CPU, float32 and bfloat16. What the functions compute is said at the top
// of lora_linear.cpp; a is all adapters' A below one another.
#pragma once

#include "cpu/lora_linear.h"

namespace forge::lora_by_torch {

// scale * s^T x for s [tokens, rank] and x [tokens, columns]: [rank, columns] in `dtype`. A float32 result of bfloat16
// inputs is never rounded to bfloat16.
inline Tensor transposed_product(const Tensor& s, const Tensor& x, double scale, ScalarType dtype) {
  const int64_t rank = s.size(1), columns = x.size(1);
  FORGE_CHECK(s.size(0) == x.size(0), "tokens", s.size(0), x.size(0));
  Tensor out = new_tensor({rank, columns}, dtype);
  if (dtype == x.scalar_type()) {
    addmm_(out, transposed(s), x, 0.0, scale);
    return out;
  }
  FORGE_CHECK(dtype == ScalarType::Float && x.scalar_type() == ScalarType::BFloat16, "lora_a, lora_b",
              toString(dtype), "the dtype of x, or float32 with bfloat16 x");
  const Tensor wide = in_dtype(s, ScalarType::Float);
  active_isa_level();  // complains here about a wrong FORGE_CPU_ISA
  torch::stable::parallel_for(0, (columns + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    kernels<LoraSkinnyKernels>().skinny_tn(data<float>(wide), data<bf16>(x), mutable_data<float>(out), begin, end,
                                           x.size(0), rank, columns, static_cast<float>(scale));
  });
  return out;
}

inline Tensor shrink(const Tensor& x, const Tensor& a, const std::vector<int64_t>& ranks,
                     const std::vector<double>& scaling, const Dropout& dropout) {
  Tensor s = new_tensor({x.size(0), a.size(0)}, x.scalar_type());
  if (!dropout.active && all_equal(scaling)) {
    addmm_(s, x, transposed(a), 0.0, scaling[0]);
    return s;
  }
  Tensor dropped = dropout.active ? new_tensor_like(x) : x;
  int64_t start = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (dropout.active) dropout.apply(x, dropped, static_cast<int64_t>(i), false);
    addmm_(columns_of(s, start, ranks[i]), dropped, transposed(rows_of(a, start, ranks[i])), 0.0,
           scaling[i] * dropout.factor());
    start += ranks[i];
  }
  return s;
}

inline Tensors shrink_backward(const Tensor& ds, const Tensor& x, const std::vector<int64_t>& ranks,
                               const std::vector<bool>& wide, const Dropout& dropout) {
  const ScalarType dtype = x.scalar_type();
  if (!dropout.active && all_equal(wide)) {
    return slices(transposed_product(ds, x, 1.0, wide[0] ? ScalarType::Float : dtype), ranks);
  }
  Tensor dropped = dropout.active ? new_tensor_like(x) : x;
  Tensors das;
  int64_t start = 0;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (dropout.active) dropout.apply(x, dropped, static_cast<int64_t>(i), false);
    das.push_back(transposed_product(columns_of(ds, start, ranks[i]), dropped, dropout.factor(),
                                     wide[i] ? ScalarType::Float : dtype));
    start += ranks[i];
  }
  return das;
}

inline Tensors matmul(const Tensor& x, const Tensor& s, const Tensors& weights, const Tensors& lora_b,
                      const Tensors& biases) {
  Tensors ys;
  int64_t start = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rank = lora_b[i].size(1);
    const Tensor si = columns_of(s, start, rank), bt = transposed(in_dtype(lora_b[i], x.scalar_type()));
    Tensor y = new_tensor({x.size(0), weights[i].size(0)}, x.scalar_type());
    // The small term first: it is rounded once while it is small, and the large sum once.
    if (biases.empty()) {
      mm_out(y, si, bt);
    } else {
      addmm_out(y, biases[i], si, bt);
    }
    addmm_(y, x, transposed(weights[i]));
    ys.push_back(y);
    start += rank;
  }
  return ys;
}

inline std::tuple<Tensor, Tensor, Tensors> matmul_backward(const Tensors& dys, const Tensor& s, const Tensors& weights,
                                                           const Tensor& a, const Tensors& lora_b,
                                                           const std::vector<double>& scaling, const Dropout& dropout,
                                                           bool need_dx, bool need_db) {
  const ScalarType dtype = s.scalar_type();
  Tensor ds = new_tensor({s.size(0), s.size(1)}, dtype);
  Tensors dbs;
  int64_t start = 0;
  for (size_t i = 0; i < dys.size(); ++i) {
    const int64_t rank = lora_b[i].size(1);
    addmm_(columns_of(ds, start, rank), dys[i], in_dtype(lora_b[i], dtype), 0.0, scaling[i]);
    if (need_db) {
      const Tensor si = columns_of(s, start, rank);
      if (lora_b[i].scalar_type() == dtype) {
        dbs.push_back(transposed_product(dys[i], si, 1.0, dtype));
      } else {
        dbs.push_back(as_contiguous(transposed(transposed_product(si, dys[i], 1.0, ScalarType::Float))));
      }
    }
    start += rank;
  }
  if (!need_dx) return {new_tensor({0}, dtype), ds, dbs};

  Tensor dx = new_tensor({s.size(0), a.size(1)}, dtype);
  if (!dropout.active) {
    mm_out(dx, ds, a);
  } else {
    Tensor part = dys.size() > 1 ? new_tensor_like(dx) : dx;
    start = 0;
    for (size_t i = 0; i < dys.size(); ++i) {
      const int64_t rank = lora_b[i].size(1);
      const Tensor& target = i == 0 ? dx : part;
      addmm_(target, columns_of(ds, start, rank), rows_of(a, start, rank), 0.0, dropout.factor());
      dropout.apply(target, dx, static_cast<int64_t>(i), i != 0);
      start += rank;
    }
  }
  for (size_t i = 0; i < dys.size(); ++i) addmm_(dx, dys[i], weights[i]);
  return {dx, ds, dbs};
}

}  // namespace forge::lora_by_torch
