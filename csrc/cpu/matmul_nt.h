// C = A B^T for bfloat16 A and B with a float32 C. torch on the CPU rounds the product of bfloat16 matrices to bfloat16
// (mm with out_dtype exists for CUDA only), which for logits loses what the softmax needs: 2^-9 of a logit of 16 is 3 %
// of a probability.
#pragma once

#include "cpu/vec.h"

namespace forge {

constexpr int64_t kNtRows = 8;      // rows of A at a time: callers pad A and C to a multiple
constexpr int64_t kNtColumns = 48;  // columns of C at a time: callers pad the rows of C to a multiple

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct MatmulNtKernels {
  // Columns [48 * begin, 48 * end) of C [rows, n], row stride ldc. A [rows, lda] with columns k..lda zero and lda even;
  // B [n, k], row stride k. Null below avx512; call it where has_bf16_dot_product() only.
  void (*panels)(const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, int64_t rows, int64_t n, int64_t k,
                 int64_t begin, int64_t end);
};

}  // namespace forge
