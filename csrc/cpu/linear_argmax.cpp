// linear_argmax: the output of a linear layer that is largest, without the outputs in memory.
#include "cpu/few_rows.h"

#if FORGE_ISA_LEVEL == 0

#include <algorithm>
#include <limits>

#include "cpu/few_rows_linear.h"

namespace forge {
namespace {

// The largest output of each of at most kFewRows rows. Threads keep the best of their own strips; of equals the first
// wins, whoever found it.
void argmax_of_few(const bf16* hidden, int64_t rows, const Tensor& lm_head, int64_t* result) {
  struct Best {
    alignas(64) float value[kFewRows];
    alignas(64) int32_t index[kFewRows];
  };
  struct State {
    float* tile;
    Best* best;
    FewRowsTerm term;
  };
  const int64_t depth = lm_head.size(1), vectors = few_rows_vectors(rows);
  std::vector<Best> found(torch::stable::get_num_threads());
  for (Best& best : found) {
    std::fill_n(best.value, kFewRows, -std::numeric_limits<float>::infinity());
    std::fill_n(best.index, kFewRows, 0);
  }
  const auto& kernel = kernels<FewRowsKernels>();
  for_strips(
      {lm_head.size(0)},
      [&](int64_t thread) {
        const int64_t words = kTileFloats + few_rows_packed(rows, depth);
        float* tile = reinterpret_cast<float*>(thread_scratch(4 * words));
        uint32_t* packed = reinterpret_cast<uint32_t*>(tile + kTileFloats);
        kernel.pack(hidden, depth, rows, depth, packed);
        return State{tile, &found[static_cast<size_t>(thread)],
                     {data<bf16>(lm_head), lm_head.stride(0), depth, packed}};
      },
      [&](const State& state, size_t, int64_t first, int64_t count, bool) {
        FewRowsTerm term = state.term;
        term.next = term.weight + (first + count) * term.ld;
        term.next_ld = term.ld;
        kernel.multiply(&term, 1, nullptr, first, count, vectors, state.tile);
        kernel.largest(state.tile, first, count, vectors, state.best->value, state.best->index);
      });
  for (int64_t row = 0; row < rows; ++row) {
    const Best* best = &found[0];  // threads have rising ranges of outputs
    for (const Best& other : found) {
      if (other.value[row] > best->value[row]) best = &other;
    }
    result[row] = best->index[row];
  }
}

Tensor linear_argmax(const Tensor& hidden_any, const Tensor& lm_head_any) {
  FORGE_CHECK(has_bf16_dot_product(), "FORGE_CPU_ISA or this CPU", "no bfloat16 dot product",
              "AVX512-BF16; other CPUs run the reference");
  FORGE_CHECK(hidden_any.dim() == 2 && lm_head_any.dim() == 2 && hidden_any.size(1) == lm_head_any.size(1) &&
                  lm_head_any.size(0) > 0 && lm_head_any.size(0) < (int64_t{1} << 31),
              "hidden, lm_head", "other shapes", "[tokens, hidden] and [vocab, hidden], a vocab of 1 to 2^31 - 1");
  for (const Tensor& x : {hidden_any, lm_head_any}) {
    FORGE_CHECK(x.scalar_type() == ScalarType::BFloat16, "hidden, lm_head", toString(x.scalar_type()), "bfloat16");
  }
  const Tensor hidden = as_contiguous(hidden_any), lm_head = as_contiguous(lm_head_any);
  const Tensor result = new_tensor({hidden.size(0)}, ScalarType::Long);
  for (int64_t row = 0; row < hidden.size(0); row += kFewRows) {
    argmax_of_few(data<bf16>(hidden) + row * hidden.size(1), std::min(kFewRows, hidden.size(0) - row), lm_head,
                  mutable_data<int64_t>(result) + row);
  }
  return result;
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("linear_argmax", TORCH_BOX(&linear_argmax)); }
STABLE_TORCH_LIBRARY_IMPL(forge, CompositeExplicitAutograd, m) {
  m.impl("has_bf16_dot_product", TORCH_BOX(&has_bf16_dot_product));
}

}  // namespace
}  // namespace forge

#endif
