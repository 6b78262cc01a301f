// Runs the matmuls of gemm_bf16.h on torch's threads. Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <algorithm>

#include "cpu/few_rows_linear.h"
#include "cpu/gemm_bf16.h"
#include "cpu/tensor.h"
#include "cpu/thread_scratch.h"

namespace forge {

// x itself if its rows or its columns have unit stride, else a copy that has.
inline Tensor row_or_column_major(const Tensor& x) {
  return x.stride(0) == 1 || x.stride(1) == 1 ? x : torch::stable::contiguous(x);
}

// The term a b: a [rows, depth] with unit stride along the depth, b [depth, columns] with unit stride along either.
inline GemmTerm gemm_term(const Tensor& a, const Tensor& b) {
  GemmTerm term{data<bf16>(a), a.stride(0), data<bf16>(b), b.stride(0), a.size(1)};
  term.b_transposed = b.stride(1) != 1;
  if (term.b_transposed) term.ldb = b.stride(1);
  return term;
}

// How many parts the rows are cut into: the fewest that keep 95 % of the threads busy, or else the best.
inline void cut_into_tasks(GemmProblem& p, int64_t threads) {
  constexpr int64_t kMinRows = 96;  // fewer, and packing B costs more than it gives
  const int64_t panels = (p.columns + kGemmColumns - 1) / kGemmColumns;
  const int64_t most = std::max<int64_t>(1, std::min(p.rows / kMinRows, 4 * threads));
  double best = 0;
  for (int64_t parts = 1; parts <= most && best < 0.95; ++parts) {
    const int64_t tasks = panels * parts, rounds = (tasks + threads - 1) / threads;
    const double busy = static_cast<double>(tasks) / static_cast<double>(rounds * threads);
    if (busy <= best) continue;
    best = busy;
    p.parts = parts;
  }
  const int64_t rows = (p.rows + p.parts - 1) / p.parts;
  p.part_rows = (rows + kGemmRowUnit - 1) / kGemmRowUnit * kGemmRowUnit;
}

// Writes p.c. Needs has_bf16_dot_product().
inline void run_gemm(GemmProblem p) {
  if (p.rows == 0 || p.columns == 0) return;
  const int64_t threads = torch::stable::get_num_threads();
  cut_into_tasks(p, threads);
  const int64_t tasks = (p.columns + kGemmColumns - 1) / kGemmColumns * p.parts;
  const int64_t bytes = gemm_scratch(p.part_rows);
  torch::stable::parallel_for(0, tasks, (tasks + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    kernels<GemmKernels>().run(p, begin, end, thread_scratch(bytes));
  });
}

// c [rows, columns], whose rows or columns have unit stride, not yet multiplied.
inline GemmProblem gemm_problem(const Tensor& c, const std::vector<GemmTerm>& terms) {
  GemmProblem p{c.size(0), c.size(1), terms.data(), static_cast<int64_t>(terms.size()), c.mutable_data_ptr(),
                c.stride(0)};
  p.c_transposed = c.stride(1) != 1;
  if (p.c_transposed) p.ldc = c.stride(1);
  p.c_float = c.scalar_type() == ScalarType::Float;
  return p;
}

// c = scale * sum of the terms (+ bias [columns]), in the dtype of c.
inline void gemm(const Tensor& c, const std::vector<GemmTerm>& terms, double scale = 1.0,
                 const Tensor* bias = nullptr) {
  GemmProblem p = gemm_problem(c, terms);
  p.scale = static_cast<float>(scale);
  if (bias != nullptr) p.bias = data<bf16>(*bias);
  run_gemm(p);
}

// c (+)= the term, c float32.
inline void gemm_add(const Tensor& c, const GemmTerm& term, bool add) {
  const std::vector<GemmTerm> terms{term};
  GemmProblem p = gemm_problem(c, terms);
  p.add_to_c = add;
  run_gemm(p);
}

struct LinearTerm {
  const Tensor x, weight;  // [rows, in], [out, in]
};

// y [rows, out] = scale * sum of x weight^T (+ bias [out]).
inline void gemm_linear(const Tensor& y, const std::vector<LinearTerm>& linears, double scale = 1.0,
                        const Tensor* bias = nullptr) {
  FewRowsSum few{y, {}, bias == nullptr ? nullptr : data<bf16>(*bias)};
  std::vector<GemmTerm> terms;
  for (const auto& [x, weight] : linears) {
    terms.push_back(gemm_term(x, transposed(weight)));
    if (takes_few_rows(x, weight)) few.products.push_back({x, weight});
  }
  if (few.products.size() == linears.size()) {
    few_rows_linear({few}, scale);
  } else {
    gemm(y, terms, scale, bias);
  }
}

}  // namespace forge
