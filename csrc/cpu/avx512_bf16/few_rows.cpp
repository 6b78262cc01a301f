// The loops of few_rows.h. A register block is up to 24 sums: for each pair along the depth one vector of x per 16 rows
// and a broadcast of each weight. On one Zen 5 core: 467 GFLOP/s with weights from memory, about 500 from a cache.
#include "cpu/few_rows.h"

#include "cpu/avx512_bf16/transpose.h"

namespace forge {
namespace FORGE_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

void pack(const bf16* x, int64_t ldx, int64_t rows, int64_t depth, uint32_t* packed) {
  const int64_t width = 16 * few_rows_vectors(rows);
  for (int64_t row = 0; row < rows; row += 16) {
    for (int64_t k = 0; k < depth; k += 32) {
      pack_16_rows(x + row * ldx + k, ldx, rows - row, depth - k, packed + k / 2 * width + row, width);
    }
  }
}

// One pair along the depth: sum[r][v] += weight pair of output r times the rows of vector v.
template <int R, int V, class Pair>
inline __attribute__((always_inline)) void add_pair(__m512 (&sum)[R][V], const uint32_t* packed, const Pair& weight) {
  __m512bh x[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) x[v] = (__m512bh)_mm512_loadu_si512(packed + 16 * v);
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    const __m512bh both = (__m512bh)_mm512_set1_epi32(weight(r));
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], both, x[v]);
  }
}

// R short streams are more than the hardware foresees. Each is fetched this many elements ahead: 8 cache lines, in which
// a block computes for 1500 cycles.
constexpr int64_t kAhead = 256;

// tile [R, 16 V] = R outputs from `row` on; the last ones of a task are followed by what the term calls next.
template <int R, int V>
void block(const FewRowsTerm* terms, int64_t count, const bf16* bias, int64_t row, bool last, float* tile) {
  __m512 sum[R][V];
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
    const __m512 start = _mm512_set1_ps(bias == nullptr ? 0.0f : to_float(bias[row + r]));
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = start;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t ld = terms[i].ld, pairs = terms[i].depth / 2;
    const bf16* weight = terms[i].weight + row * ld;
    const uint32_t* packed = terms[i].packed;
    const bf16* next = last ? terms[i].next : weight + R * ld;
    const int64_t next_ld = last ? terms[i].next_ld : ld;
    for (int64_t from = 0; from < pairs; from += 16) {
      const bool inside = 2 * from + kAhead < terms[i].depth;
      const bf16* ahead = inside ? weight + 2 * from + kAhead : next + 2 * from + kAhead - terms[i].depth;
      const int64_t ahead_ld = inside ? ld : next_ld;
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(ahead + r * ahead_ld), _MM_HINT_T0);
      const int64_t end = smaller(from + 16, pairs);
#pragma GCC unroll 1
      for (int64_t pair = from; pair < end; ++pair) {
        add_pair<R, V>(sum, packed + pair * 16 * V, [&](int r) {
          int32_t both;
          __builtin_memcpy(&both, weight + r * ld + 2 * pair, sizeof(both));
          return both;
        });
      }
    }
    if (terms[i].depth % 2 != 0) {
      add_pair<R, V>(sum, packed + pairs * 16 * V, [&](int r) { return int32_t{weight[r * ld + 2 * pairs].bits}; });
    }
  }
#pragma GCC unroll 24
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(tile + (r * V + v) * 16, sum[r][v]);
  }
}

template <int R, int V>
void multiply_by_blocks(const FewRowsTerm* terms, int64_t term_count, const bf16* bias, int64_t first, int64_t count,
                        float* tile) {
  int64_t row = 0;
  const auto last = [&](int64_t rows) { return row + rows == count; };
  for (; row + R <= count; row += R) block<R, V>(terms, term_count, bias, first + row, last(R), tile + row * 16 * V);
  for (; row + 4 <= count; row += 4) block<4, V>(terms, term_count, bias, first + row, last(4), tile + row * 16 * V);
  for (; row < count; ++row) block<1, V>(terms, term_count, bias, first + row, last(1), tile + row * 16 * V);
}

void multiply(const FewRowsTerm* terms, int64_t term_count, const bf16* bias, int64_t first, int64_t count,
              int64_t vectors, float* tile) {
  if (vectors == 1) multiply_by_blocks<24, 1>(terms, term_count, bias, first, count, tile);
  if (vectors == 2) multiply_by_blocks<12, 2>(terms, term_count, bias, first, count, tile);
  if (vectors == 3) multiply_by_blocks<8, 3>(terms, term_count, bias, first, count, tile);
  if (vectors == 4) multiply_by_blocks<6, 4>(terms, term_count, bias, first, count, tile);
}

void store(const float* tile, float scale, int64_t count, int64_t rows, const bf16* residual, bf16* y, int64_t ldy) {
  const int64_t width = 16 * few_rows_vectors(rows);
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t column = 0; column < count; column += 16) {
    const int64_t columns = smaller(16, count - column);
    const __mmask16 valid = static_cast<__mmask16>(low_bits(columns));
    for (int64_t row = 0; row < rows; row += 16) {
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        x[i] = i < columns ? _mm512_loadu_si512(tile + (column + i) * width + row) : _mm512_setzero_si512();
      }
      transpose_16x16(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (row + i >= rows) break;
        const int64_t at = (row + i) * ldy + column;
        __m512 value = _mm512_mul_ps(_mm512_castsi512_ps(x[i]), factor);
        if (residual != nullptr) {
          const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, residual + at));
          value = _mm512_add_ps(value, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
        }
        _mm256_mask_storeu_epi16(y + at, valid, (__m256i)_mm512_cvtneps_pbh(value));
      }
    }
  }
}

void largest(const float* tile, int64_t first, int64_t count, int64_t vectors, float* best, int32_t* index) {
  for (int64_t v = 0; v < vectors; ++v) {
    __m512 highest = _mm512_loadu_ps(best + 16 * v);
    __m512i at = _mm512_loadu_si512(index + 16 * v);
    for (int64_t i = 0; i < count; ++i) {
      const __m512 x = _mm512_loadu_ps(tile + (i * vectors + v) * 16);
      const __mmask16 above = _mm512_cmp_ps_mask(x, highest, _CMP_GT_OQ);
      highest = _mm512_mask_mov_ps(highest, above, x);
      at = _mm512_mask_mov_epi32(at, above, _mm512_set1_epi32(static_cast<int32_t>(first + i)));
    }
    _mm512_storeu_ps(best + 16 * v, highest);
    _mm512_storeu_si512(index + 16 * v, at);
  }
}

const RegisterKernels<FewRowsKernels> register_kernels({&pack, &multiply, &store, &largest});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge
