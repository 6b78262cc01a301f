// Shares the tasks of decode_attention.h among torch's threads. Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <vector>

#include "cpu/decode_attention.h"
#include "cpu/tensor.h"

namespace forge {

// One boundary per thread and one more: thread i takes tasks bounds[i] to bounds[i + 1], about equally many tokens each.
inline std::vector<int64_t> balanced_tasks(const DecodeShape& shape, const int64_t* lengths, int64_t sequences) {
  constexpr int64_t kOverhead = 16;  // tokens that the start of a task costs as much as
  const int64_t threads = torch::stable::get_num_threads();
  const auto cost = [&](int64_t sequence) {
    const int64_t length = lengths[sequence];
    return kOverhead + (shape.window > 0 && length > shape.window ? shape.window : length);
  };
  int64_t total = 0, before = 0;
  for (int64_t i = 0; i < sequences; ++i) total += shape.kv_heads * cost(i);
  std::vector<int64_t> bounds{0};
  for (int64_t task = 0; task < sequences * shape.kv_heads; ++task) {
    before += cost(task / shape.kv_heads);
    while (static_cast<int64_t>(bounds.size()) < threads &&
           before * threads >= total * static_cast<int64_t>(bounds.size())) {
      bounds.push_back(task + 1);
    }
  }
  bounds.resize(static_cast<size_t>(threads) + 1, sequences * shape.kv_heads);
  return bounds;
}

// Calls run(begin, end) for each thread's tasks.
template <class Run>
void run_balanced(const std::vector<int64_t>& bounds, const Run& run) {
  torch::stable::parallel_for(0, static_cast<int64_t>(bounds.size()) - 1, 1, [&](int64_t from, int64_t to) {
    if (bounds[from] < bounds[to]) run(bounds[from], bounds[to]);
  });
}

}  // namespace forge
