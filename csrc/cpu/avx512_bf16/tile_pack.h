// Moves bfloat16 rows into the layouts that tile_matmul.h multiplies, and float32 tiles back to bfloat16 rows.
#pragma once

#include "cpu/avx512_bf16/transpose.h"
#include "cpu/vec.h"

namespace forge::FORGE_ISA {

constexpr int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Elements [from, from + 32) of a row of d, zero past d. A row that is null is a row of zeros.
inline __m512i load_row(const bf16* row, int64_t from, int64_t d) {
  if (row == nullptr) return _mm512_setzero_si512();
  if (from + 32 <= d) return _mm512_loadu_si512(row + from);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << (d - from)) - 1), row + from);
}

// 16 rows of d -> columns[pair * stride + row], pairs along d; pairs up to d rounded up to 32 are written. sign_bits is
// xored to every pair.
inline void transpose_pairs(const bf16* const* rows, int64_t d, uint32_t sign_bits, uint32_t* columns, int64_t stride) {
  const __m512i signs = _mm512_set1_epi32(static_cast<int>(sign_bits));
  for (int64_t from = 0; from < d; from += 32) {
    __m512i x[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = load_row(rows[i], from, d);
    transpose_16x16(x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      _mm512_storeu_si512(columns + (from / 2 + i) * stride, _mm512_xor_si512(x[i], signs));
    }
  }
}

// Index vectors that put element i of one row beside element i of another: for _mm512_permutex2var_epi16 the first and
// the last 16 elements of two registers, for _mm512_permutexvar_epi16 the halves of one.
struct Interleave {
  __m512i low, high, halves;
};

inline Interleave make_interleave() {
  alignas(64) uint16_t low[32], high[32], halves[32];
  for (int i = 0; i < 16; ++i) {
    low[2 * i] = static_cast<uint16_t>(i);
    low[2 * i + 1] = static_cast<uint16_t>(32 + i);
    high[2 * i] = static_cast<uint16_t>(16 + i);
    high[2 * i + 1] = static_cast<uint16_t>(48 + i);
    halves[2 * i] = static_cast<uint16_t>(i);
    halves[2 * i + 1] = static_cast<uint16_t>(16 + i);
  }
  return {_mm512_load_si512(low), _mm512_load_si512(high), _mm512_load_si512(halves)};
}

// Two rows of d -> pairs[i] = (first[i], second[i]), written up to d rounded up to 32.
inline void interleave_rows(const Interleave& order, const bf16* first, const bf16* second, int64_t d,
                            uint32_t* pairs) {
  for (int64_t from = 0; from < d; from += 32) {
    const __m512i a = load_row(first, from, d), b = load_row(second, from, d);
    _mm512_storeu_si512(pairs + from, _mm512_permutex2var_epi16(a, order.low, b));
    _mm512_storeu_si512(pairs + from + 16, _mm512_permutex2var_epi16(a, order.high, b));
  }
}

inline void copy_row(const bf16* row, int64_t d, uint32_t* pairs) {
  for (int64_t from = 0; from < d; from += 32) _mm512_storeu_si512(pairs + from / 2, load_row(row, from, d));
}

// 32 floats to bfloat16, to nearest even.
inline __m512i round_to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// columns [d, stride] times factor [16] -> 16 rows of d in bfloat16, of which the first `count` are written. Reads, and
// drops, columns up to d rounded up to 32.
inline void scatter_columns(const Interleave& order, const float* columns, int64_t stride, const float* factor,
                            int64_t d, int64_t count, bf16* const* rows) {
  const __m512 scale = _mm512_loadu_ps(factor);
  for (int64_t from = 0; from < d; from += 32) {
    __m512i x[16];  // pairs of columns
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const float* pair = columns + (from + 2 * i) * stride;
      x[i] = round_to_bf16(_mm512_mul_ps(_mm512_loadu_ps(pair), scale),
                           _mm512_mul_ps(_mm512_loadu_ps(pair + stride), scale));
      x[i] = _mm512_permutexvar_epi16(order.halves, x[i]);
    }
    transpose_16x16(x);
    const __mmask32 inside =
        from + 32 <= d ? ~__mmask32{0} : static_cast<__mmask32>((uint64_t{1} << (d - from)) - 1);
    for (int64_t i = 0; i < count; ++i) _mm512_mask_storeu_epi16(rows[i] + from, inside, x[i]);
  }
}

// 2^x by 2^floor(x) * p(x - floor(x)), p the polynomial of degree 4 of least relative error on [0, 1): 2.7e-6 in
// float32, where rounding the result to bfloat16 costs up to 2e-3. 2^-inf is 0: vreduceps gives 0 for it, vscalefps
// does the rest.
inline __m512 exp2_approx(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.013534168f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05201146f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24144276f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.69300383f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000026f));
  return _mm512_scalef_ps(p, x);
}

// Natural logarithm of a positive normal number: x = m 2^e with 0.75 <= m < 1.5, log(m) = 2 atanh((m - 1) / (m + 1)) by
// its series up to the ninth power, 2e-9 from the whole of it.
inline __m512 log_approx(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  const __m512 e = _mm512_getexp_ps(_mm512_div_ps(x, m));  // the division is exact
  const __m512 s = _mm512_div_ps(_mm512_sub_ps(m, one), _mm512_add_ps(m, one));
  const __m512 square = _mm512_mul_ps(s, s);
  __m512 p = _mm512_set1_ps(2.0f / 9.0f);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 7.0f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 5.0f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f / 3.0f));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.0f));
  return _mm512_fmadd_ps(e, _mm512_set1_ps(0.69314718f), _mm512_mul_ps(p, s));
}

}  // namespace forge::FORGE_ISA
