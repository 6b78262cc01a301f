// Small float32 matmuls on tiles that lie in cache, for kernels that fuse one with what comes before and after it.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace forge::FORGE_ISA {

#if FORGE_ISA_LEVEL >= 2
constexpr int kVectorFloats = 16;
#elif FORGE_ISA_LEVEL == 1
constexpr int kVectorFloats = 8;
#else
constexpr int kVectorFloats = 4;
#endif

// One register of floats; loads and stores need no alignment.
typedef float Vector __attribute__((vector_size(kVectorFloats * sizeof(float)), aligned(4), may_alias));

inline Vector& vector_at(float* p) { return *reinterpret_cast<Vector*>(p); }
inline const Vector& vector_at(const float* p) { return *reinterpret_cast<const Vector*>(p); }

// The register block: kBlockRows x kBlockVectors accumulators, and room for one row of b and one broadcast of a.
constexpr int kBlockRows = FORGE_ISA_LEVEL >= 2 ? 6 : 4;
constexpr int kBlockVectors = FORGE_ISA_LEVEL >= 2 ? 4 : 2;

// a(row, k) = a[row * row_stride + k * k_stride]
struct TileA {
  const float* values;
  int64_t row_stride, k_stride;
};

template <int R, int N>
inline __attribute__((always_inline)) void matmul_block(const TileA& a, const float* b, int64_t b_stride, float* c,
                                                        int64_t c_stride, int64_t depth, const float* column_scale,
                                                        bool accumulate) {
  Vector sum[R][N] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) row[n] = vector_at(b + k * b_stride + n * kVectorFloats);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float factor = a.values[r * a.row_stride + k * a.k_stride];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[r][n] += factor * row[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      // Earlier sums join at the end: small terms are then added to small sums, and rounding errors stay small too.
      Vector& target = vector_at(c + r * c_stride + n * kVectorFloats);
      if (!accumulate) {
        target = sum[r][n];
      } else if (column_scale == nullptr) {
        target += sum[r][n];
      } else {
        target = target * vector_at(column_scale + n * kVectorFloats) + sum[r][n];
      }
    }
  }
}

// Rows that do not fill a block, then vectors that do not: one instance of matmul_block for each size.
template <int R, int N>
void matmul_columns(const TileA& a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t vectors,
                    int64_t depth, const float* column_scale, bool accumulate) {
  int64_t v = 0;
  for (; v + N <= vectors; v += N) {
    const int64_t column = v * kVectorFloats;
    matmul_block<R, N>(a, b + column, b_stride, c + column, c_stride, depth,
                       column_scale == nullptr ? nullptr : column_scale + column, accumulate);
  }
  if constexpr (N > 1) {
    const int64_t column = v * kVectorFloats;
    if (v < vectors) {
      matmul_columns<R, N - 1>(a, b + column, b_stride, c + column, c_stride, vectors - v, depth,
                               column_scale == nullptr ? nullptr : column_scale + column, accumulate);
    }
  }
}

template <int R>
void matmul_last_rows(const TileA& a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
                      int64_t vectors, int64_t depth, const float* column_scale, bool accumulate) {
  if constexpr (R > 0) {
    if (rows == R) {
      matmul_columns<R, kBlockVectors>(a, b, b_stride, c, c_stride, vectors, depth, column_scale, accumulate);
    } else {
      matmul_last_rows<R - 1>(a, b, b_stride, c, c_stride, rows, vectors, depth, column_scale, accumulate);
    }
  }
}

// c [rows, columns] = (accumulate ? c * column_scale : 0) + a [rows, depth] b [depth, columns]; columns: a multiple of
// kVectorFloats; column_scale [columns] is optional. Terms are added in the order of depth, earlier sums last.
inline void tile_matmul(const TileA& a, const float* b, int64_t b_stride, float* c, int64_t c_stride, int64_t rows,
                        int64_t columns, int64_t depth, bool accumulate, const float* column_scale = nullptr) {
  const int64_t vectors = columns / kVectorFloats;
  int64_t row = 0;
  for (; row + kBlockRows <= rows; row += kBlockRows) {
    const TileA block{a.values + row * a.row_stride, a.row_stride, a.k_stride};
    matmul_columns<kBlockRows, kBlockVectors>(block, b, b_stride, c + row * c_stride, c_stride, vectors, depth,
                                              column_scale, accumulate);
  }
  const TileA block{a.values + row * a.row_stride, a.row_stride, a.k_stride};
  matmul_last_rows<kBlockRows - 1>(block, b, b_stride, c + row * c_stride, c_stride, rows - row, vectors, depth,
                                   column_scale, accumulate);
}

}  // namespace forge::FORGE_ISA
