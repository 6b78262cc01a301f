// C = sum over terms of A_t B_t, bfloat16 in, one float32 sum, rounded once at the end: with the terms (x, W) and (S, B)
// a frozen layer and its adapter are one matmul, and nothing is concatenated in memory.
#pragma once

#include "cpu/vec.h"

namespace forge {

// One bit an element of a contiguous matrix, in its order: set where dropout keeps the element. One word of room behind
// the last bit.
using KeepBits = const uint64_t*;

// A [rows, depth] times B [depth, columns]; row strides lda and ldb.
struct GemmTerm {
  const bf16* a;
  int64_t lda;
  const bf16* b;
  int64_t ldb;
  int64_t depth;
  bool b_transposed = false;  // b is stored [columns, depth]
  KeepBits keep_a = nullptr, keep_b = nullptr, keep_product = nullptr;
  float product_scale = 1;  // with keep_product
};

struct GemmProblem {
  int64_t rows, columns;
  const GemmTerm* terms;
  int64_t term_count;
  void* c;
  int64_t ldc;
  bool c_float = false;       // float32, else bfloat16
  bool c_transposed = false;  // c is stored [columns, rows]
  bool add_to_c = false;      // of float32 c
  float scale = 1;            // of the sum
  const bf16* bias = nullptr;  // [columns], added after the scale
  // The work is cut into panels of kGemmColumns columns times `parts` parts of `part_rows` rows.
  int64_t parts = 1, part_rows = 0;
};

constexpr int64_t kGemmColumns = 64;
constexpr int64_t kGemmPairs = 1024;   // depth packed at a time, in pairs of elements: 256 KiB, inside L2
constexpr int64_t kGemmPieces = 16;    // pieces of terms packed at a time
constexpr int64_t kGemmMaxRows = 12;   // rows of a register block
constexpr int64_t kGemmRowUnit = 24;   // part_rows is a multiple: of the rows of every register block

// Bytes of scratch of one thread, 64-byte aligned.
constexpr int64_t gemm_scratch(int64_t part_rows) {
  constexpr int64_t kPacked = (kGemmPairs + 16 * kGemmPieces) * kGemmColumns * 4;
  constexpr int64_t kStaged = kGemmMaxRows * 2 * (kGemmPairs + kGemmPieces) * 2;
  return kPacked + (kStaged + 63) / 64 * 64 + (part_rows + kGemmMaxRows) * kGemmColumns * 4;
}

struct GemmKernels {
  // Tasks [begin, end): task i is part i % parts of panel i / parts. 
  void (*run)(const GemmProblem& problem, int64_t begin, int64_t end, char* scratch);
  // Bit e = word e % 4 of Philox counter (e / 4, stream, 0) is at least lowest_kept, for words [begin, end) of 64 bits.
  void (*keep_bits)(uint64_t* bits, int64_t begin, int64_t end, uint64_t seed, uint32_t stream, uint32_t lowest_kept);
  // y [columns, rows] = transposed x [rows, columns], row stride ldx, for columns [begin, end).
  void (*transpose)(const bf16* x, int64_t ldx, int64_t rows, bf16* y, int64_t begin, int64_t end);
};

}  // namespace forge
