// The register block of float32 C += A B for bfloat16, on the AVX512-BF16 dot product, and the packing of its B.
#pragma once

#include <immintrin.h>

#include "cpu/matmul_nt.h"
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 reports the deliberately undefined operand inside its own unpack and shuffle intrinsics (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace forge::FORGE_ISA {

constexpr int64_t kMaxPairs = 384;  // depth of one block, in pairs: 48 columns of it are 72 KiB, well inside L2

// The depth in even blocks.
inline int64_t block_pairs(int64_t pairs) {
  const int64_t blocks = (pairs + kMaxPairs - 1) / kMaxPairs;
  return blocks == 0 ? kMaxPairs : round_up((pairs + blocks - 1) / blocks, 16);
}

// Transposes 16 rows of 16 pairs, rows `stride` elements apart, to packed[pair * 48 + row].
inline void transpose_16x16(const bf16* source, int64_t stride, uint32_t* packed) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(source + i * stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[4 * i + 0] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  }
  // x[4 * g + c] holds, in 128-bit lane l, pair 4 * l + c of rows 4 * g .. 4 * g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xee);
    const __m512i low23 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x44);
    const __m512i high23 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xee);
    _mm512_storeu_si512(packed + (0 + c) * kNtColumns, _mm512_shuffle_i32x4(low01, low23, 0x88));
    _mm512_storeu_si512(packed + (4 + c) * kNtColumns, _mm512_shuffle_i32x4(low01, low23, 0xdd));
    _mm512_storeu_si512(packed + (8 + c) * kNtColumns, _mm512_shuffle_i32x4(high01, high23, 0x88));
    _mm512_storeu_si512(packed + (12 + c) * kNtColumns, _mm512_shuffle_i32x4(high01, high23, 0xdd));
  }
}

// packed[pair * 48 + column] = the two elements of that pair in row `column` of b [columns, >= depth], zero outside.
inline void pack(const bf16* b, int64_t stride, int64_t columns, int64_t depth, uint32_t* packed) {
  const int64_t whole = columns == kNtColumns ? depth / 32 * 16 : 0;  // pairs that the transpose handles
  for (int64_t pair = 0; pair < whole; pair += 16) {
    for (int64_t column = 0; column < kNtColumns; column += 16) {
      transpose_16x16(b + column * stride + 2 * pair, stride, packed + pair * kNtColumns + column);
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
