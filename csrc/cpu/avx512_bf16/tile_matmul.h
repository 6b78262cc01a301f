// Small matmuls of bfloat16 pairs on tiles that lie in cache: the bfloat16 counterpart of cpu/tile_matmul.h.
//
// A pair is two bfloat16 numbers that lie one after the other along the depth of the matmul, kept as a uint32.
// vdpbf16ps multiplies 16 pairs by 16 pairs and adds both products to 16 floats: 64 FLOPs an instruction.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/isa.h"

namespace forge::FORGE_ISA {

constexpr int64_t kVector = 16;  // floats, or pairs, of a register

// The left operand, one pair at a time: rows of pairs, or the transpose of it.
struct RowsOfPairs {
  const uint32_t* pairs;
  int64_t stride;
  RowsOfPairs from(int64_t row) const { return {pairs + row * stride, stride}; }
  __m512bh broadcast(int64_t row, int64_t k) const {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[row * stride + k]));
  }
};

struct ColumnsOfPairs {
  const uint32_t* pairs;
  int64_t stride;
  ColumnsOfPairs from(int64_t row) const { return {pairs + row, stride}; }
  __m512bh broadcast(int64_t row, int64_t k) const {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(pairs[k * stride + row]));
  }
};

// The register block: 24 accumulators hide the latency of two dot products a cycle (at least 12 are needed), 4
// registers hold a row of b and one the broadcast pair of a. 10 loads for 24 dot products leave the load ports idle
// half of the time.
constexpr int kBlockRows = 6;
constexpr int kBlockVectors = 4;

struct TileB {
  const uint32_t* pairs;
  int64_t stride;
};

struct TileC {
  float* values;
  int64_t stride;
};

enum class Sum { kStore, kAdd, kScaleAndAdd };

template <int R, int N, class A>
inline __attribute__((always_inline)) void matmul_block(const A& a, const uint32_t* b, int64_t b_stride, float* c,
                                                        int64_t c_stride, int64_t depth, Sum mode,
                                                        const float* column_scale) {
  __m512 sum[R][N];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m512bh row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = (__m512bh)_mm512_loadu_si512(b + k * b_stride + n * kVector);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh factor = a.broadcast(r, k);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], factor, row[n]);
    }
  }
  // Earlier sums join at the end: small terms are then added to small sums, and rounding errors stay small too.
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      float* target = c + r * c_stride + n * kVector;
      if (mode == Sum::kAdd) {
        sum[r][n] = _mm512_add_ps(_mm512_loadu_ps(target), sum[r][n]);
      } else if (mode == Sum::kScaleAndAdd) {
        sum[r][n] = _mm512_fmadd_ps(_mm512_loadu_ps(target), _mm512_loadu_ps(column_scale + n * kVector), sum[r][n]);
      }
      _mm512_storeu_ps(target, sum[r][n]);
    }
  }
}

// One block of rows; the vectors of a row are split into blocks of equal size, or nearly so.
template <int R, class A>
void matmul_rows(const A& a, const TileB& b, const TileC& c, int64_t vectors, int64_t depth, Sum mode,
                 const float* column_scale) {
  int64_t blocks = (vectors + kBlockVectors - 1) / kBlockVectors;
  for (int64_t v = 0; v < vectors; --blocks) {
    const int64_t n = (vectors - v + blocks - 1) / blocks, column = v * kVector;
    const float* scale = column_scale + (mode == Sum::kScaleAndAdd ? column : 0);
    if (n == 4) matmul_block<R, 4>(a, b.pairs + column, b.stride, c.values + column, c.stride, depth, mode, scale);
    if (n == 3) matmul_block<R, 3>(a, b.pairs + column, b.stride, c.values + column, c.stride, depth, mode, scale);
    if (n == 2) matmul_block<R, 2>(a, b.pairs + column, b.stride, c.values + column, c.stride, depth, mode, scale);
    if (n == 1) matmul_block<R, 1>(a, b.pairs + column, b.stride, c.values + column, c.stride, depth, mode, scale);
    v += n;
  }
}

// c [rows, columns] = a [rows, depth] b [depth, columns], stored, added to c, or added to c * column_scale [columns].
// depth counts pairs; columns come as vectors of 16. Rows are split into blocks of equal size, or nearly so: 64 rows
// are 9 blocks of 6 and 2 of 5, since the 4 that 10 blocks of 6 leave would not hide the latency.
template <class A>
void tile_matmul(const A& a, const TileB& b, const TileC& c, int64_t rows, int64_t vectors, int64_t depth, Sum mode,
                 const float* column_scale = nullptr) {
  int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;
  for (int64_t row = 0; row < rows; --blocks) {
    const int64_t r = (rows - row + blocks - 1) / blocks;
    const A block = a.from(row);
    const TileC target{c.values + row * c.stride, c.stride};
    if (r == 6) matmul_rows<6>(block, b, target, vectors, depth, mode, column_scale);
    if (r == 5) matmul_rows<5>(block, b, target, vectors, depth, mode, column_scale);
    if (r == 4) matmul_rows<4>(block, b, target, vectors, depth, mode, column_scale);
    if (r == 3) matmul_rows<3>(block, b, target, vectors, depth, mode, column_scale);
    if (r == 2) matmul_rows<2>(block, b, target, vectors, depth, mode, column_scale);
    if (r == 1) matmul_rows<1>(block, b, target, vectors, depth, mode, column_scale);
    row += r;
  }
}

}  // namespace forge::FORGE_ISA
