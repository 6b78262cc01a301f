// Runs the loops of streamed_head.h over the rows of a loss. Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "cpu/linear_head.h"
#include "cpu/streamed_head.h"

namespace forge {

// A row's softmax, y = softcap * tanh(z / softcap) / temperature.
struct StreamedRow {
  double max, exp_sum;  // of y, and sum(e^(y - max))
  double logprob, entropy;
  bool correct;  // the target is the first maximum
};

// d(loss)/dy = at_all * softmax(y) + at_target * onehot(target)
struct StreamedGradient {
  double at_all = 0, at_target = 0;
};

// Whether this head goes without logits in memory: bfloat16 with the dot product, and pairs that end where rows end.
inline bool head_can_stream(const Tensor& hidden) {
  return hidden.scalar_type() == ScalarType::BFloat16 && hidden.size(1) > 0 && hidden.size(1) % 2 == 0 &&
         has_bf16_dot_product();
}

// Calls row(i, StreamedRow) -> StreamedGradient for every row `rows[i]`, from several threads; returns dhidden, zero in
// all other rows, or an empty tensor when it is not needed. Scratch: [kStreamRows, width] floats a task.
template <class F>
Tensor stream_rows(const Tensor& hidden, const Tensor& lm_head, const std::vector<int64_t>& rows,
                   const std::vector<int64_t>& targets, float softcap, float temperature, bool need_dhidden,
                   const F& row) {
  // Tasks are (slice of the vocabulary, block of rows); how many depends on the shapes alone, so results do not depend
  // on the threads. Slices give work to all threads when rows are few.
  constexpr int64_t kTasks = 24, kMaxSlices = 8, kMinSlice = 8 * kStreamPanel, kChunkRows = 16 * kStreamRows;
  const auto& loops = kernels<StreamedHeadKernels>();
  const int64_t count = static_cast<int64_t>(rows.size()), width = hidden.size(1), vocab = lm_head.size(0);
  const int64_t stride = round_up(width, kNtColumns);
  const int64_t chunk_rows = std::min(count, kChunkRows);
  const int64_t most_blocks = (chunk_rows + kStreamRows - 1) / kStreamRows;
  const int64_t slices = most_blocks == 0 ? 1 : std::clamp<int64_t>(
      std::min((kTasks + most_blocks - 1) / most_blocks, vocab / kMinSlice), 1, kMaxSlices);
  const int64_t slice_rows = round_up((vocab + slices - 1) / slices, kStreamPanel);
  const StreamedHead head{data<bf16>(hidden), data<bf16>(lm_head), width, vocab, softcap, temperature};

  const int64_t out_rows = need_dhidden ? hidden.size(0) : 0;
  const Tensor dhidden = count == out_rows ? new_tensor({out_rows, width}, ScalarType::BFloat16)
                                           : new_zeros({out_rows, width}, ScalarType::BFloat16);
  const int64_t acc_rows = most_blocks * kStreamRows;
  const Tensor acc_of_slices = new_tensor({need_dhidden ? slices * acc_rows : 0, stride}, ScalarType::Float);
  float* acc = need_dhidden ? mutable_data<float>(acc_of_slices) : nullptr;
  std::vector<StreamedSums> sums(static_cast<size_t>(slices * acc_rows));

  for (int64_t first = 0; first < count; first += chunk_rows) {
    const int64_t size = std::min(chunk_rows, count - first);
    const int64_t blocks = (size + kStreamRows - 1) / kStreamRows;
    // Whoever is free takes the next task: a thread that loses its core for a while does not hold up the others.
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, blocks * slices, 1, [&](int64_t, int64_t) {
      const Tensor workspace = new_tensor({streamed_workspace(width)}, ScalarType::Byte);
      for (int64_t task = next++; task < blocks * slices; task = next++) {
        const int64_t slice = task / blocks, block = task % blocks * kStreamRows;
        const int64_t begin = slice * slice_rows, at = slice * acc_rows + block;
        loops.task(head, rows.data() + first + block, targets.data() + first + block,
                   std::min(kStreamRows, size - block), begin, std::min(begin + slice_rows, vocab),
                   mutable_data<uint8_t>(workspace), sums.data() + at, acc == nullptr ? nullptr : acc + at * stride,
                   stride);
      }
    });
    torch::stable::parallel_for(0, size, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const StreamedSums* of_row = sums.data() + i;
        StreamedSums all = of_row[0];
        for (int64_t s = 1; s < slices; ++s) {
          const StreamedSums& slice = of_row[s * acc_rows];
          if (slice.max > all.max) all.max = slice.max, all.argmax = slice.argmax;
        }
        const int64_t target = targets[first + i];
        float factor[kMaxSlices];
        all.exp_sum = all.exp_shift_sum = 0;
        for (int64_t s = 0; s < slices; ++s) {
          const StreamedSums& slice = of_row[s * acc_rows];
          const double shift = static_cast<double>(slice.max) - static_cast<double>(all.max), scale = std::exp(shift);
          all.exp_sum += scale * slice.exp_sum;
          all.exp_shift_sum += scale * (slice.exp_shift_sum + shift * slice.exp_sum);
          factor[s] = static_cast<float>(scale);
          if (target >= s * slice_rows && target < (s + 1) * slice_rows) all.y_target = slice.y_target;
        }
        const double log_sum = std::log(all.exp_sum), y_target = static_cast<double>(all.y_target);
        const StreamedGradient gradient =
            row(first + i, StreamedRow{static_cast<double>(all.max), all.exp_sum,
                                       (y_target - static_cast<double>(all.max)) - log_sum,
                                       log_sum - all.exp_shift_sum / all.exp_sum, all.argmax == target});
        if (!need_dhidden) continue;
        const double tanh = softcap > 0 ? y_target * static_cast<double>(temperature / softcap) : 0.0;
        const double inverse = 1.0 / static_cast<double>(temperature);
        for (int64_t s = 0; s < slices; ++s) {
          factor[s] = static_cast<float>(static_cast<double>(factor[s]) * gradient.at_all * inverse / all.exp_sum);
        }
        loops.finish(head, acc + i * stride, slices, acc_rows * stride, factor,
                     static_cast<float>(gradient.at_target * inverse * (1.0 - tanh * tanh)), target,
                     mutable_data<bf16>(dhidden) + rows[first + i] * width);
      }
    });
  }
  return need_dhidden ? dhidden : new_tensor({0}, ScalarType::BFloat16);
}

}  // namespace forge
