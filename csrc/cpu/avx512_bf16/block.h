// The register block of float32 C += A B for bfloat16, on the AVX512-BF16 dot product, and the packing of its B.
#pragma once

#include "cpu/avx512_bf16/transpose.h"
#include "cpu/matmul_nt.h"

namespace forge::FORGE_ISA {

constexpr int64_t kMaxPairs = 384;  // depth of one block, in pairs: 48 columns of it are 72 KiB, well inside L2

// The depth in even blocks.
inline int64_t block_pairs(int64_t pairs) {
  const int64_t blocks = (pairs + kMaxPairs - 1) / kMaxPairs;
  return blocks == 0 ? kMaxPairs : round_up((pairs + blocks - 1) / blocks, 16);
}

// packed[pair * 48 + column] = the two elements of that pair in row `column` of b [columns, >= depth], zero outside.
inline void pack(const bf16* b, int64_t stride, int64_t columns, int64_t depth, uint32_t* packed) {
  const int64_t whole = columns == kNtColumns ? depth / 32 * 16 : 0;  // pairs that the transpose handles
  for (int64_t pair = 0; pair < whole; pair += 16) {
    for (int64_t column = 0; column < kNtColumns; column += 16) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(b + (column + i) * stride + 2 * pair);
      transpose_16x16(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(packed + (pair + i) * kNtColumns + column, x[i]);
    }
  }
  for (int64_t pair = whole; pair < (depth + 1) / 2; ++pair) {
    for (int64_t column = 0; column < kNtColumns; ++column) {
      const bf16* source = b + column * stride + 2 * pair;
      const uint32_t low = column < columns ? source[0].bits : 0u;
      const uint32_t high = column < columns && 2 * pair + 1 < depth ? source[1].bits : 0u;
      packed[pair * kNtColumns + column] = low | high << 16;
    }
  }
}

// 8 x 48 block of C, 24 accumulators; adds to C unless `first`. Pair p of row r of A: at a + r * row_stride +
// p * pair_stride. The sum over the pairs starts from zero and joins C at the end: small terms are added to small sums.
inline __attribute__((always_inline)) void block_8x48(const bf16* a, int64_t row_stride, int64_t pair_stride,
                                                      const uint32_t* packed, int64_t pairs, float* c, int64_t ldc,
                                                      bool first) {
  __m512 sum[kNtRows][3];
#pragma GCC unroll 8
  for (int r = 0; r < kNtRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) sum[r][j] = _mm512_setzero_ps();
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh columns[3];
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) columns[j] = (__m512bh)_mm512_loadu_si512(packed + pair * kNtColumns + 16 * j);
#pragma GCC unroll 8
    for (int r = 0; r < kNtRows; ++r) {
      int32_t both;
      __builtin_memcpy(&both, a + r * row_stride + pair * pair_stride, sizeof(both));
      const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 3
      for (int j = 0; j < 3; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], row, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kNtRows; ++r) {
#pragma GCC unroll 3
    for (int j = 0; j < 3; ++j) {
      float* out = c + r * ldc + 16 * j;
      _mm512_storeu_ps(out, first ? sum[r][j] : _mm512_add_ps(_mm512_loadu_ps(out), sum[r][j]));
    }
  }
}

}  // namespace forge::FORGE_ISA
