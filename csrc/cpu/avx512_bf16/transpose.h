// The steps that every packing along the depth shares.
#pragma once

#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 reports the deliberately undefined operand inside its own unpack, shuffle and conversion intrinsics (GCC bug
// 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "cpu/vec.h"

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

// The lowest `count` bits of a mask set; all of them from 64 on.
inline uint64_t low_bits(int64_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// 16 rows of 32 elements, `stride` apart -> packed[pair * packed_stride + row]; only `rows` rows and `depth` elements
// are read, the others are zero.
inline void pack_16_rows(const bf16* source, int64_t stride, int64_t rows, int64_t depth, uint32_t* packed,
                         int64_t packed_stride) {
  const __mmask32 valid = static_cast<__mmask32>(low_bits(depth));
  __m512i x[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    x[i] = i < rows ? _mm512_maskz_loadu_epi16(valid, source + i * stride) : _mm512_setzero_si512();
  }
  transpose_16x16(x);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(packed + i * packed_stride, x[i]);
}

}  // namespace forge::FORGE_ISA
