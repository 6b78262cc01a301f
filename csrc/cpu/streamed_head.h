// Softmax statistics and dhidden of a frozen bfloat16 head without logits in memory: as in attention (Dao et al., arXiv
// 2205.14135) with the head as keys and values. A panel of the head makes a tile of logits, the tile's exponentials
// multiply the same panel while it is in the second-level cache, and a new maximum rescales what was summed before.
//
//   y = softcap * tanh(z / softcap) / temperature
//   sums of e^(y - max), and acc = sum over v of e^(y_v - max) * (1 - tanh(z_v / softcap)^2) * head[v]
//
// Whatever depends on the row alone is applied at the end: dhidden = a * acc + b * head[target].
#pragma once

#include "cpu/vec.h"

namespace forge {

constexpr int64_t kStreamRows = 144;   // rows of a task: what a panel is used for before the next one is fetched
constexpr int64_t kStreamPanel = 192;  // rows of the head at a time

struct StreamedHead {
  const bf16 *hidden, *lm_head;  // contiguous; width is even
  int64_t width, vocab;
  float softcap, temperature;  // softcap 0: none
};

// Of one row over a slice of the vocabulary.
struct StreamedSums {
  float max, y_target;            // y_target: only from the slice that holds the target
  int64_t argmax;                 // the first one
  double exp_sum, exp_shift_sum;  // sums of e^(y - max) and of e^(y - max) * (y - max)
};

struct StreamedHeadKernels {
  // Rows of `hidden` rows[0, n), n <= kStreamRows, over head rows [begin, end): sums [n] and, unless null, acc
  // [n rounded up to 8, stride]. workspace: streamed_workspace(width) bytes.
  void (*task)(const StreamedHead& head, const int64_t* rows, const int64_t* targets, int64_t n, int64_t begin,
               int64_t end, void* workspace, StreamedSums* sums, float* acc, int64_t stride);
  // out = sum over slices of factor[s] * acc[s * slice_stride] + at_target * head row `target`.
  void (*finish)(const StreamedHead& head, const float* acc, int64_t slices, int64_t slice_stride, const float* factor,
                 float at_target, int64_t target, bf16* out);
};

// Packed hidden rows, a tile of logits, its exponentials as bfloat16, a strip of the panel, sums.
constexpr int64_t streamed_workspace(int64_t width) {
  return 4 * (kStreamRows * (width / 2) + kStreamPanel * kStreamRows + kStreamPanel / 2 * kStreamRows +
              kStreamPanel / 2 * 48 + 8 * kStreamRows) + 2 * (kStreamRows + 8) * width + 4096;
}

}  // namespace forge
