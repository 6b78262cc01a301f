// Runs the matmuls of few_rows.h on torch's threads. Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/few_rows.h"
#include "cpu/tensor.h"
#include "cpu/thread_scratch.h"

namespace forge {

constexpr int64_t kTileFloats = kStrip * kFewRows;

// Splits projections with these numbers of outputs into strips of kStrip and these evenly among the threads. Each thread
// calls state = prepare(its number) once and then strip(state, projection, first, count, last) for its strips; last: the
// thread has no more.
template <class Prepare, class Strip>
void for_strips(const std::vector<int64_t>& outputs, const Prepare& prepare, const Strip& strip) {
  int64_t strips = 0;
  for (int64_t count : outputs) strips += (count + kStrip - 1) / kStrip;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t grain = std::max<int64_t>(1, (strips + threads - 1) / threads);  // as many as a thread gets
  torch::stable::parallel_for(0, strips, grain, [&](int64_t begin, int64_t end) {
    const auto state = prepare(begin / grain);
    int64_t before = 0;  // strips of the projections before this one
    for (size_t i = 0; i < outputs.size(); ++i) {
      const int64_t own = (outputs[i] + kStrip - 1) / kStrip;
      for (int64_t s = std::max(begin, before); s < std::min(end, before + own); ++s) {
        const int64_t first = (s - before) * kStrip;
        strip(state, i, first, std::min(kStrip, outputs[i] - first), s + 1 == end);
      }
      before += own;
    }
  });
}

// Whether x weight^T can run here. Needs has_bf16_dot_product().
inline bool takes_few_rows(const Tensor& x, const Tensor& weight) {
  return x.size(0) <= kFewRows && x.stride(1) == 1 && weight.stride(1) == 1;
}

struct FewRowsSum {
  struct Product {
    Tensor x, weight;  // [rows, depth], [outputs, depth], for which takes_few_rows()
  };
  Tensor y;  // [rows, outputs], rows contiguous
  std::vector<Product> products;
  const bf16* bias = nullptr;
};

// Each y = scale * (sum of its products + bias), for sums with the same x in the same places; at most kFewRows rows.
inline void few_rows_linear(const std::vector<FewRowsSum>& sums, double scale = 1.0) {
  const int64_t rows = sums[0].y.size(0), vectors = few_rows_vectors(rows);
  if (rows == 0) return;
  std::vector<int64_t> outputs;
  for (const FewRowsSum& sum : sums) outputs.push_back(sum.y.size(1));
  struct State {
    float* tile;
    std::vector<FewRowsTerm> terms;
  };
  const auto& products = sums[0].products;
  const auto& kernel = kernels<FewRowsKernels>();
  for_strips(
      outputs,
      [&](int64_t) {
        int64_t words = kTileFloats;
        for (const auto& product : products) words += few_rows_packed(rows, product.x.size(1));
        State state{reinterpret_cast<float*>(thread_scratch(4 * words)), {}};
        uint32_t* packed = reinterpret_cast<uint32_t*>(state.tile + kTileFloats);
        for (const auto& [x, weight] : products) {
          kernel.pack(data<bf16>(x), x.stride(0), rows, x.size(1), packed);
          state.terms.push_back({nullptr, 0, x.size(1), packed});
          packed += few_rows_packed(rows, x.size(1));
        }
        return state;
      },
      [&](const State& state, size_t i, int64_t first, int64_t count, bool) {
        std::vector<FewRowsTerm> terms = state.terms;
        for (size_t t = 0; t < terms.size(); ++t) {
          terms[t].weight = data<bf16>(sums[i].products[t].weight);
          terms[t].ld = terms[t].next_ld = sums[i].products[t].weight.stride(0);
          terms[t].next = terms[t].weight + (first + count) * terms[t].ld;
        }
        kernel.multiply(terms.data(), static_cast<int64_t>(terms.size()), sums[i].bias, first, count, vectors,
                        state.tile);
        kernel.store(state.tile, static_cast<float>(scale), count, rows, nullptr,
                     mutable_data<bf16>(sums[i].y) + first, sums[i].y.stride(0));
      });
}

}  // namespace forge
