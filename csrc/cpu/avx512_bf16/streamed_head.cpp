// The loops of streamed_head.h. Logits lie transposed, [head rows, hidden rows]: the head is then read as it is, the
// softmax runs down the registers, and pairs of exponentials are an operand of the second product without a shuffle.
#include "cpu/streamed_head.h"

#include "cpu/avx512_bf16/block.h"
#include "cpu/softmax_row.h"

namespace forge {
namespace FORGE_ISA {
namespace {

struct Workspace {
  uint32_t* hidden;   // [kStreamRows / 48][width / 2][48] pairs
  float* logits;      // [kStreamPanel][kStreamRows]
  uint32_t* weights;  // [kStreamPanel / 2][kStreamRows] pairs of e^(y - max) * slope
  uint32_t* strip;    // [kStreamPanel / 2][48] pairs of head rows
  float *max, *new_max, *exp_sum, *exp_shift_sum;  // [kStreamRows]
  bf16 *gathered, *last_rows;                      // [kStreamRows, width], [8, width]

  Workspace(void* memory, int64_t width) : at_(static_cast<char*>(memory)) {
    hidden = take<uint32_t>(kStreamRows * (width / 2));
    logits = take<float>(kStreamPanel * kStreamRows);
    weights = take<uint32_t>(kStreamPanel / 2 * kStreamRows);
    strip = take<uint32_t>(kStreamPanel / 2 * kNtColumns);
    max = take<float>(kStreamRows);
    new_max = take<float>(kStreamRows);
    exp_sum = take<float>(kStreamRows);
    exp_shift_sum = take<float>(kStreamRows);
    gathered = take<bf16>(kStreamRows * width);
    last_rows = take<bf16>(kNtRows * width);
  }

 private:
  template <class T>
  T* take(int64_t count) {
    at_ = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(at_) + 63) & ~uintptr_t{63});
    T* result = reinterpret_cast<T*>(at_);
    at_ += count * static_cast<int64_t>(sizeof(T));
    return result;
  }

  char* at_;
};

void pack_hidden(const StreamedHead& head, const int64_t* rows, int64_t n, const Workspace& work) {
  for (int64_t i = 0; i < n; ++i) {
    __builtin_memcpy(work.gathered + i * head.width, head.hidden + rows[i] * head.width,
                     static_cast<size_t>(head.width) * sizeof(bf16));
  }
  for (int64_t row = 0; row < n; row += kNtColumns) {
    const int64_t columns = n - row < kNtColumns ? n - row : kNtColumns;
    pack(work.gathered + row * head.width, head.width, columns, head.width, work.hidden + row * (head.width / 2));
  }
}

// Asks for the next panel while this one is multiplied, a few cache lines per register block: a panel comes from
// memory, and the processor does not see it coming.
class NextPanel {
 public:
  NextPanel(const StreamedHead& head, int64_t first, int64_t end, int64_t blocks)
      : at_(reinterpret_cast<const char*>(head.lm_head + first * head.width)),
        end_(reinterpret_cast<const char*>(head.lm_head + (end > first ? end : first) * head.width)),
        step_(((end_ - at_) / blocks + 63) & ~int64_t{63}) {}

  void fetch_some() {
    for (int64_t i = 0; i < step_ && at_ < end_; i += 64, at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const char *at_, *end_;
  int64_t step_;
};

// logits[v][row] for head rows [first, first + size); fills whole blocks of 8 head rows and 48 rows.
void logits_tile(const StreamedHead& head, int64_t first, int64_t size, int64_t n, const Workspace& work) {
  const int64_t pairs = head.width / 2, pairs_per_block = block_pairs(pairs);
  for (int64_t begin = 0; begin < pairs; begin += pairs_per_block) {
    const int64_t depth = pairs - begin < pairs_per_block ? pairs - begin : pairs_per_block;
    for (int64_t row = 0; row < n; row += kNtColumns) {
      const uint32_t* packed = work.hidden + row * pairs + begin * kNtColumns;
      for (int64_t v = 0; v < size; v += kNtRows) {
        // The last rows of the head are copied: a block reads eight.
        const bf16* a = head.lm_head + (first + v) * head.width;
        if (first + v + kNtRows > head.vocab) {
          if (row == 0 && begin == 0) {
            const int64_t left = head.vocab - (first + v);
            __builtin_memcpy(work.last_rows, a, static_cast<size_t>(left * head.width) * sizeof(bf16));
            __builtin_memset(work.last_rows + left * head.width, 0,
                             static_cast<size_t>((kNtRows - left) * head.width) * sizeof(bf16));
          }
          a = work.last_rows;
        }
        block_8x48(a + 2 * begin, head.width, 2, packed, depth, work.logits + v * kStreamRows + row, kStreamRows,
                   begin == 0);
      }
    }
  }
}

// Two bfloat16 numbers, neither of them NaN, as one pair.
inline uint32_t pair_of(float low, float high) {
  uint32_t l, h;
  __builtin_memcpy(&l, &low, sizeof(l));
  __builtin_memcpy(&h, &high, sizeof(h));
  l += 0x7fffu + ((l >> 16) & 1u);
  h += 0x7fffu + ((h >> 16) & 1u);
  return l >> 16 | (h & 0xffff0000u);
}

// exp_sum, exp_shift_sum and the pairs of weights of a tile whose maxima are in work.max.
template <bool kCap>
void exponentials(int64_t size, int64_t n, float to_tanh, const Workspace& work) {
  for (int64_t i = 0; i < n; ++i) work.exp_sum[i] = work.exp_shift_sum[i] = 0;
  const float* __restrict max = work.max;
  float* __restrict exp_sum = work.exp_sum;
  float* __restrict exp_shift_sum = work.exp_shift_sum;
  for (int64_t v = 0; v < size; v += 2) {
    const float* __restrict y0 = work.logits + v * kStreamRows;
    const float* __restrict y1 = v + 1 < size ? y0 + kStreamRows : y0;
    const float keep = v + 1 < size ? 1.0f : 0.0f;
    uint32_t* __restrict out = work.weights + v / 2 * kStreamRows;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const float shifted0 = y0[i] - max[i], shifted1 = y1[i] - max[i];
      float e0 = exp_nonpositive(shifted0), e1 = keep * exp_nonpositive(shifted1);
      exp_sum[i] += e0 + e1;
      exp_shift_sum[i] += e0 * shifted0 + e1 * shifted1;
      if (kCap) {
        const float tanh0 = y0[i] * to_tanh, tanh1 = y1[i] * to_tanh;
        e0 *= 1.0f - tanh0 * tanh0;
        e1 *= 1.0f - tanh1 * tanh1;
      }
      out[i] = pair_of(e0, e1);
    }
  }
}

// Takes the tile into the running sums; where the maximum grows, what was summed before shrinks.
void softmax_tile(const StreamedHead& head, int64_t first, int64_t size, int64_t n, const int64_t* targets,
                  const Workspace& work, StreamedSums* sums, float* acc, int64_t stride) {
  const float scale = 1.0f / head.temperature;
  const int64_t padded = round_up(n, 16);
  if (head.softcap > 0 || scale != 1.0f) {
    for (int64_t v = 0; v < size; ++v) cap_block(work.logits + v * kStreamRows, padded, head.softcap, scale);
  }
  for (int64_t i = 0; i < padded; ++i) work.new_max[i] = work.logits[i];
  for (int64_t v = 1; v < size; ++v) {
    const float* __restrict y = work.logits + v * kStreamRows;
    float* __restrict new_max = work.new_max;
#pragma omp simd
    for (int64_t i = 0; i < padded; ++i) new_max[i] = y[i] > new_max[i] ? y[i] : new_max[i];
  }
  for (int64_t i = 0; i < n; ++i) {
    if (targets[i] >= first && targets[i] < first + size) {
      sums[i].y_target = work.logits[(targets[i] - first) * kStreamRows + i];
    }
    if (sums[i].argmax >= 0 && !(work.new_max[i] > sums[i].max)) continue;
    int64_t v = 0;
    while (v < size - 1 && !(work.logits[v * kStreamRows + i] == work.new_max[i])) ++v;
    if (sums[i].argmax >= 0) {
      const double shift = static_cast<double>(sums[i].max) - static_cast<double>(work.new_max[i]);
      const double factor = __builtin_exp(shift);
      sums[i].exp_shift_sum = (sums[i].exp_shift_sum + sums[i].exp_sum * shift) * factor;
      sums[i].exp_sum *= factor;
      if (acc != nullptr) {
        const float narrow = static_cast<float>(factor);
        float* row = acc + i * stride;
#pragma omp simd
        for (int64_t k = 0; k < head.width; ++k) row[k] *= narrow;
      }
    }
    sums[i].max = work.max[i] = work.new_max[i];
    sums[i].argmax = first + v;
  }
  for (int64_t i = n; i < padded; ++i) work.max[i] = work.new_max[i];
  if (head.softcap > 0) {
    exponentials<true>(size, padded, head.temperature / head.softcap, work);
  } else {
    exponentials<false>(size, padded, 0.0f, work);
  }
  for (int64_t i = 0; i < n; ++i) {
    sums[i].exp_sum += static_cast<double>(work.exp_sum[i]);
    sums[i].exp_shift_sum += static_cast<double>(work.exp_shift_sum[i]);
  }
}

// Pairs of the head's rows [first, first + size) in columns [column, column + 48), zero outside.
void pack_strip(const StreamedHead& head, int64_t first, int64_t size, int64_t column, uint32_t* strip) {
  const int64_t columns = head.width - column < kNtColumns ? head.width - column : kNtColumns;
  for (int64_t v = 0; v < size; v += 2) {
    const bf16* __restrict low = head.lm_head + (first + v) * head.width + column;
    const bf16* __restrict high = v + 1 < size ? low + head.width : low;
    const uint32_t keep = v + 1 < size ? 0xffff0000u : 0u;
    uint32_t* __restrict out = strip + v / 2 * kNtColumns;
    if (columns == kNtColumns) {
#pragma omp simd
      for (int64_t k = 0; k < kNtColumns; ++k) {
        out[k] = static_cast<uint32_t>(low[k].bits) | (static_cast<uint32_t>(high[k].bits) << 16 & keep);
      }
    } else {
      for (int64_t k = 0; k < kNtColumns; ++k) {
        out[k] = k < columns ? static_cast<uint32_t>(low[k].bits) | (static_cast<uint32_t>(high[k].bits) << 16 & keep)
                             : 0u;
      }
    }
  }
}

// acc [n, stride] += weights of the tile times the head's rows; stride holds whole blocks of 48, acc whole blocks of 8.
void add_to_acc(const StreamedHead& head, int64_t first, int64_t size, int64_t n, bool overwrite, NextPanel* next,
                const Workspace& work, float* acc, int64_t stride) {
  const bf16* weights = reinterpret_cast<const bf16*>(work.weights);
  for (int64_t column = 0; column < head.width; column += kNtColumns) {
    pack_strip(head, first, size, column, work.strip);
    for (int64_t row = 0; row < n; row += kNtRows) {
      next->fetch_some();
      block_8x48(weights + 2 * row, 2, 2 * kStreamRows, work.strip, (size + 1) / 2, acc + row * stride + column, stride,
                 overwrite);
    }
  }
}

void task(const StreamedHead& head, const int64_t* rows, const int64_t* targets, int64_t n, int64_t begin, int64_t end,
          void* workspace, StreamedSums* sums, float* acc, int64_t stride) {
  const FlushDenormals flush_denormals;
  const Workspace work(workspace, head.width);
  pack_hidden(head, rows, n, work);
  for (int64_t i = 0; i < n; ++i) sums[i] = {0, 0, -1, 0, 0};
  for (int64_t first = begin; first < end; first += kStreamPanel) {
    const int64_t size = end - first < kStreamPanel ? end - first : kStreamPanel;
    const int64_t next_end = end - first < 2 * kStreamPanel ? end : first + 2 * kStreamPanel;
    NextPanel next(head, first + size, next_end, ((head.width + 47) / kNtColumns) * ((n + 7) / kNtRows));
    logits_tile(head, first, size, n, work);
    softmax_tile(head, first, size, n, targets, work, sums, acc, stride);
    if (acc != nullptr) add_to_acc(head, first, size, n, first == begin, &next, work, acc, stride);
  }
}

void finish(const StreamedHead& head, const float* acc, int64_t slices, int64_t slice_stride, const float* factor,
            float at_target, int64_t target, bf16* out) {
  const bf16* w = head.lm_head + target * head.width;
#pragma omp simd
  for (int64_t k = 0; k < head.width; ++k) {
    float sum = 0;
    for (int64_t s = 0; s < slices; ++s) sum += factor[s] * acc[s * slice_stride + k];
    out[k] = from_float<bf16>(sum + at_target * to_float(w[k]));
  }
}

const RegisterKernels<StreamedHeadKernels> register_kernels({&task, &finish});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge
