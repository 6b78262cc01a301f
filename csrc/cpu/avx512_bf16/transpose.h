// The step that every packing along the depth shares.
#pragma once

#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 reports the deliberately undefined operand inside its own unpack, shuffle and conversion intrinsics (GCC bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "cpu/isa.h"

namespace forge::FORGE_ISA {

// Transposes a 16 x 16 matrix of 32-bit numbers: x[r] becomes column r.
inline void transpose_16x16(__m512i (&x)[16]) {
  __m512i y[16];
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
  // x[4 * g + c] holds, in 128-bit lane l, column 4 * l + c of rows 4 * g .. 4 * g + 3.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    y[c] = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x44);
    y[4 + c] = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xee);
    y[8 + c] = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x44);
    y[12 + c] = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    x[c] = _mm512_shuffle_i32x4(y[c], y[8 + c], 0x88);
    x[4 + c] = _mm512_shuffle_i32x4(y[c], y[8 + c], 0xdd);
    x[8 + c] = _mm512_shuffle_i32x4(y[4 + c], y[12 + c], 0x88);
    x[12 + c] = _mm512_shuffle_i32x4(y[4 + c], y[12 + c], 0xdd);
  }
}

}  // namespace forge::FORGE_ISA
