// y = x W^T for a few rows of x, as in a step of decoding: the rows of x become the lanes of vectors, y^T = W x^T. x is
// packed once per thread and the weights, which are all the work, are read once, where they lie.
#pragma once

#include "cpu/vec.h"

namespace forge {

constexpr int64_t kFewRows = 64;  // at most: four vectors of lanes
constexpr int64_t kStrip = 48;    // outputs of one task, a multiple of the 24, 12, 8 or 6 of a register block

// One product of a sum: weight [outputs, depth], row stride ld, times packed rows of x [rows, depth].
struct FewRowsTerm {
  const bf16* weight;
  int64_t ld;
  int64_t depth;
  const uint32_t* packed;
  const bf16* next = nullptr;  // rows of weights that are read after these, fetched in time; row stride next_ld
  int64_t next_ld = 0;
};

// Vectors of 16 lanes that hold this many rows; lanes beyond them are zero.
constexpr int64_t few_rows_vectors(int64_t rows) { return (rows + 15) / 16; }

// Words of x [rows, depth] when packed; pairs of elements along the depth, in whole blocks of 16 pairs.
constexpr int64_t few_rows_packed(int64_t rows, int64_t depth) {
  return (depth + 31) / 32 * 16 * 16 * few_rows_vectors(rows);
}

struct FewRowsKernels {
  // x [rows, depth], row stride ldx -> packed [pairs][16 * vectors].
  void (*pack)(const bf16* x, int64_t ldx, int64_t rows, int64_t depth, uint32_t* packed);
  // tile [count, 16 * vectors] = sum over the terms, outputs [first, first + count), from bias [outputs] on if there is.
  void (*multiply)(const FewRowsTerm* terms, int64_t term_count, const bf16* bias, int64_t first, int64_t count,
                   int64_t vectors, float* tile);
  // y [rows, count] = scale * transposed tile (+ residual, which lies as y does and may be y).
  void (*store)(const float* tile, float scale, int64_t count, int64_t rows, const bf16* residual, bf16* y,
                int64_t ldy);
  // For each lane: best and index of the largest number so far, the first of equals; tile row 0 is number `first`.
  void (*largest)(const float* tile, int64_t first, int64_t count, int64_t vectors, float* best, int32_t* index);
};

}  // namespace forge
