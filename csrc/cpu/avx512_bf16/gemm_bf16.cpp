// The loops of gemm_bf16.h. A panel of B is packed once as pairs along the depth; blocks of rows x 64 columns are then
// summed in registers, A read where it lies: one broadcast of a pair and four dot-product instructions per row.
// On one Zen 5 core: 505 GFLOP/s of about 515, packing included.
#include "cpu/gemm_bf16.h"

#include "cpu/avx512_bf16/transpose.h"

namespace forge {
namespace FORGE_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// 64 bits from bit `first` on.
inline uint64_t bits_at(KeepBits bits, int64_t first) {
  const int64_t word = first / 64, shift = first % 64;
  return shift == 0 ? bits[word] : bits[word] >> shift | bits[word + 1] << (64 - shift);
}

// ---- packing ------------------------------------------------------------------------------------------------

// Rows [from, from + depth) of the term's B, columns [column, column + columns) -> packed [pairs][16 * vectors].
void pack(const GemmTerm& term, int64_t from, int64_t depth, int64_t column, int64_t columns, int64_t vectors,
          uint32_t* packed) {
  const int64_t width = 16 * vectors;
  if (term.b_transposed) {
    for (int64_t k = 0; k < depth; k += 32) {
      for (int64_t j = 0; j < columns; j += 16) {
        pack_16_rows(term.b + (column + j) * term.ldb + from + k, term.ldb, columns - j, depth - k,
                     packed + k / 2 * width + j, width);
      }
    }
    return;
  }
  constexpr int64_t kAhead = 16;  // rows: a row of a panel is one or two cache lines, too far apart for the hardware
  const uint64_t valid = low_bits(columns);
  for (int64_t k = 0; k < depth; k += 2) {
    const int64_t row = from + k;
    const bf16* first = term.b + row * term.ldb + column;
    const bf16* second = first + term.ldb;
    uint64_t keep_first = valid, keep_second = k + 1 < depth ? valid : 0;
    if (k + kAhead + 1 < depth) {
      for (int64_t j = 0; j < columns; j += 32) {
        _mm_prefetch(reinterpret_cast<const char*>(first + kAhead * term.ldb + j), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(second + kAhead * term.ldb + j), _MM_HINT_T0);
      }
    }
    if (term.keep_b != nullptr) {
      keep_first &= bits_at(term.keep_b, row * term.ldb + column);
      if (keep_second != 0) keep_second &= bits_at(term.keep_b, (row + 1) * term.ldb + column);
    }
    for (int64_t v = 0; v < vectors; ++v) {
      const __mmask16 low_mask = static_cast<__mmask16>(keep_first >> (16 * v));
      const __mmask16 high_mask = static_cast<__mmask16>(keep_second >> (16 * v));
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(low_mask, first + 16 * v));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(high_mask, second + 16 * v));
      _mm512_storeu_si512(packed + k / 2 * width + 16 * v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// Rows of A that cannot be read where they lie: too few for a register block, an odd depth, or dropout.
void stage(const GemmTerm& term, int64_t row, int64_t rows, int64_t block_rows, int64_t from, int64_t depth,
           bf16* staged, int64_t stride) {
  for (int64_t r = 0; r < block_rows; ++r) {
    const bf16* source = term.a + (row + r) * term.lda + from;
    for (int64_t k = 0; k < stride; k += 32) {
      uint64_t keep = r < rows && k < depth ? low_bits(smaller(depth - k, 32)) : 0;
      if (keep != 0 && term.keep_a != nullptr) keep &= bits_at(term.keep_a, (row + r) * term.lda + from + k);
      const __mmask32 room = static_cast<__mmask32>(low_bits(smaller(stride - k, 32)));
      _mm512_mask_storeu_epi16(staged + r * stride + k, room,
                               _mm512_maskz_loadu_epi16(static_cast<__mmask32>(keep), source + k));
    }
  }
}

// ---- register blocks ----------------------------------------------------------------------------------------

struct Piece {
  const bf16* a;
  int64_t lda;
  const uint32_t* packed;
  int64_t pairs;
  int64_t ahead;  // elements from a to what is read next and is not in the cache yet; 0: it is
};

// tile [R, kGemmColumns] (+)= the products of all pieces, for 16 * V columns.
template <int R, int V>
void block(const Piece* pieces, int64_t count, float* tile, bool accumulate) {
  __m512 sum[R][V];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[r][v] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < count; ++i) {
    const bf16* a = pieces[i].a;
    const int64_t lda = pieces[i].lda, pairs = pieces[i].pairs, ahead = pieces[i].ahead;
    const uint32_t* packed = pieces[i].packed;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      if (pair % 16 == 0 && ahead != 0) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
          _mm_prefetch(reinterpret_cast<const char*>(a + ahead + r * lda + 2 * pair), _MM_HINT_T0);
        }
      }
      __m512bh columns[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(packed + (pair * V + v) * 16);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        int32_t both;
        __builtin_memcpy(&both, a + r * lda + 2 * pair, sizeof(both));
        const __m512bh row = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], row, columns[v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* target = tile + r * kGemmColumns + 16 * v;
      _mm512_storeu_ps(target, accumulate ? _mm512_add_ps(_mm512_loadu_ps(target), sum[r][v]) : sum[r][v]);
    }
  }
}

using Block = void (*)(const Piece*, int64_t, float*, bool);
// By the number of vectors: 24 sums (fewer for narrow panels) hide the latency of the dot product.
constexpr Block kBlocks[4] = {&block<12, 1>, &block<12, 2>, &block<8, 3>, &block<6, 4>};
constexpr int64_t kBlockRows[4] = {12, 12, 8, 6};

// target (+)= scale * kept elements of tile, a part of a product [., width] that begins with its element number `first`.
void add_kept(const float* tile, KeepBits keep, float scale, int64_t first, int64_t width, int64_t rows, int64_t vectors,
              float* target, bool accumulate) {
  for (int64_t r = 0; r < rows; ++r) {
    const uint64_t kept = bits_at(keep, first + r * width);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t at = r * kGemmColumns + 16 * v;
      const __m512 part = _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept >> (16 * v)), tile + at);
      const __m512 x = _mm512_mul_ps(part, _mm512_set1_ps(scale));
      _mm512_storeu_ps(target + at, accumulate ? _mm512_add_ps(_mm512_loadu_ps(target + at), x) : x);
    }
  }
}

// 16 columns of the scaled sum, with the bias.
inline __m512 scaled(const GemmProblem& p, const float* tile, int64_t column, __mmask16 valid) {
  const __m512 x = _mm512_mul_ps(_mm512_loadu_ps(tile), _mm512_set1_ps(p.scale));
  if (p.bias == nullptr) return x;
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(valid, p.bias + column));
  return _mm512_add_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)));
}

// Scales, adds the bias, rounds and writes rows x columns of C.
void finish(const GemmProblem& p, const float* tile, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < columns; j += 16) {
      const __mmask16 valid = static_cast<__mmask16>(low_bits(smaller(columns - j, 16)));
      __m512 x = scaled(p, tile + r * kGemmColumns + j, column + j, valid);
      const int64_t at = (row + r) * p.ldc + column + j;
      if (p.c_float) {
        float* out = static_cast<float*>(p.c) + at;
        if (p.add_to_c) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(valid, out));
        _mm512_mask_storeu_ps(out, valid, x);
      } else {
        _mm256_mask_storeu_epi16(static_cast<bf16*>(p.c) + at, valid, (__m256i)_mm512_cvtneps_pbh(x));
      }
    }
  }
}

// The same for a C that is stored [columns, rows]: 64 bytes of a column of the tile at a time.
void finish_transposed(const GemmProblem& p, const float* tile, int64_t row, int64_t rows, int64_t column,
                       int64_t columns) {
  const int64_t step = p.c_float ? 16 : 32;
  for (int64_t r = 0; r < rows; r += step) {
    for (int64_t j = 0; j < columns; j += 16) {
      const __mmask16 valid = static_cast<__mmask16>(low_bits(smaller(columns - j, 16)));
      const auto at_row = [&](int64_t i) {
        return r + i < rows ? scaled(p, tile + (r + i) * kGemmColumns + j, column + j, valid)
                            : _mm512_setzero_ps();
      };
      __m512i x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (p.c_float) {
          x[i] = _mm512_castps_si512(at_row(i));
        } else {  // two rows to a lane
          const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(at_row(2 * i)));
          const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(at_row(2 * i + 1)));
          x[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
        }
      }
      transpose_16x16(x);
      const uint64_t kept = low_bits(rows - r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        if (j + i >= columns) break;
        const int64_t at = (column + j + i) * p.ldc + row + r;
        if (p.c_float) {
          float* out = static_cast<float*>(p.c) + at;
          __m512 sum = _mm512_castsi512_ps(x[i]);
          if (p.add_to_c) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(static_cast<__mmask16>(kept), out));
          _mm512_mask_storeu_ps(out, static_cast<__mmask16>(kept), sum);
        } else {
          _mm512_mask_storeu_epi16(static_cast<bf16*>(p.c) + at, static_cast<__mmask32>(kept), x[i]);
        }
      }
    }
  }
}

// ---- the whole ----------------------------------------------------------------------------------------------

// The pieces that are packed together: as many as fit; a term whose product is masked stands alone.
struct Round {
  int64_t count = 0;
  struct {
    const GemmTerm* term;
    int64_t from, depth, packed;  // packed: where its pairs start
  } pieces[kGemmPieces];
  const GemmTerm* masked = nullptr;
};

struct Position {
  int64_t term = 0, from = 0;
};

Round next_round(const GemmProblem& p, Position& at) {
  Round round;
  int64_t pairs = 0;
  while (at.term < p.term_count && round.count < kGemmPieces && pairs < kGemmPairs) {
    const GemmTerm& term = p.terms[at.term];
    if (term.keep_product != nullptr && round.count > 0 && at.from == 0) break;
    const int64_t depth = smaller(term.depth - at.from, 2 * (kGemmPairs - pairs));
    round.pieces[round.count++] = {&term, at.from, depth, pairs};
    pairs += (depth + 31) / 32 * 16;
    at.from += depth;
    if (at.from >= term.depth) at = {at.term + 1, 0};
    if (term.keep_product != nullptr) {
      round.masked = &term;
      break;
    }
  }
  return round;
}

void run(const GemmProblem& p, int64_t begin, int64_t end, char* scratch) {
  uint32_t* packed = reinterpret_cast<uint32_t*>(scratch);
  float* strip = reinterpret_cast<float*>(packed + (kGemmPairs + 16 * kGemmPieces) * kGemmColumns);
  float* product = strip + p.part_rows * kGemmColumns;
  bf16* staged = reinterpret_cast<bf16*>(product + kGemmMaxRows * kGemmColumns);
  Position all;
  next_round(p, all);
  const int64_t panels = (p.columns + kGemmColumns - 1) / kGemmColumns;
  const bool single = all.term == p.term_count;  // then the sums of one block at a time are kept, and B stays packed
  int64_t packed_panel = -1;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task / p.parts, column = panel * kGemmColumns;
    const int64_t columns = smaller(kGemmColumns, p.columns - column), vectors = (columns + 15) / 16;
    const int64_t row_begin = task % p.parts * p.part_rows, row_end = smaller(p.rows, row_begin + p.part_rows);
    const int64_t block_rows = kBlockRows[vectors - 1];
    Position at;
    bool first = true;
    while (at.term < p.term_count) {
      const Round round = next_round(p, at);
      if (!single || panel != packed_panel) {
        for (int64_t i = 0; i < round.count; ++i) {
          const auto& piece = round.pieces[i];
          pack(*piece.term, piece.from, piece.depth, column, columns, vectors, packed + piece.packed * 16 * vectors);
        }
        packed_panel = panel;
      }
      for (int64_t row = row_begin; row < row_end; row += block_rows) {
        const int64_t rows = smaller(block_rows, row_end - row);
        Piece pieces[kGemmPieces];
        bf16* room = staged;
        for (int64_t i = 0; i < round.count; ++i) {
          const auto& piece = round.pieces[i];
          const GemmTerm& term = *piece.term;
          pieces[i] = {term.a + row * term.lda + piece.from, term.lda, packed + piece.packed * 16 * vectors,
                       (piece.depth + 1) / 2, panels == 1 ? block_rows * term.lda : 0};
          if (rows < block_rows || piece.depth % 2 != 0 || term.keep_a != nullptr) {
            const int64_t stride = 2 * pieces[i].pairs;
            stage(term, row, rows, block_rows, piece.from, piece.depth, room, stride);
            pieces[i].a = room;
            pieces[i].lda = stride;
            pieces[i].ahead = 0;
            room += block_rows * stride;
          }
        }
        float* tile = strip + (single && !p.c_transposed ? 0 : (row - row_begin) * kGemmColumns);
        if (round.masked == nullptr) {
          kBlocks[vectors - 1](pieces, round.count, tile, !first);
        } else {
          kBlocks[vectors - 1](pieces, round.count, product, false);
          add_kept(product, round.masked->keep_product, round.masked->product_scale, row * p.columns + column, p.columns,
                   rows, vectors, tile, !first);
        }
        if (at.term == p.term_count && !p.c_transposed) finish(p, tile, row, rows, column, columns);
      }
      first = false;
    }
    if (p.c_transposed) finish_transposed(p, strip, row_begin, row_end - row_begin, column, columns);
  }
}

// The random words of 8 Philox4x32-10 counters (Salmon et al., SC 2011) as bits; each word in the low half of a lane of
// 64 bits, where the multiplication wants it and leaves high and low word of the product.
inline uint32_t keep_8_counters(uint64_t counter, const __m512i* keys, __m512i stream, __m512i threshold) {
  const __m512i multiplier0 = _mm512_set1_epi64(0xD2511F53), multiplier2 = _mm512_set1_epi64(0xCD9E8D57);
  // The counter is a multiple of 8: adding the lane never carries into its high half.
  __m512i c0 = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(counter & 0xffffffffu)),
                                _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  __m512i c1 = _mm512_set1_epi64(static_cast<int64_t>(counter >> 32)), c2 = stream, c3 = _mm512_setzero_si512();
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i product0 = _mm512_mul_epu32(c0, multiplier0), product2 = _mm512_mul_epu32(c2, multiplier2);
    // a ^ b ^ c; the high halves of the lanes hold whatever was there.
    c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product2, 32), c1, keys[2 * round], 0x96);
    c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(product0, 32), c3, keys[2 * round + 1], 0x96);
    c1 = product2;
    c3 = product0;
  }
  uint32_t bits = 0;
  const __m512i words[4] = {c0, c1, c2, c3};
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __mmask8 kept = _mm512_cmpge_epu64_mask(_mm512_slli_epi64(words[i], 32), threshold);
    bits |= _pdep_u32(kept, 0x11111111u << i);
  }
  return bits;
}

void keep_bits(uint64_t* bits, int64_t begin, int64_t end, uint64_t seed, uint32_t stream, uint32_t lowest_kept) {
  __m512i keys[20];
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    keys[2 * round] = _mm512_set1_epi64(key0);
    keys[2 * round + 1] = _mm512_set1_epi64(key1);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  const __m512i streams = _mm512_set1_epi64(stream);
  const __m512i threshold = _mm512_set1_epi64(static_cast<int64_t>(static_cast<uint64_t>(lowest_kept) << 32));
  for (int64_t word = begin; word < end; ++word) {
    const uint64_t counter = 16 * static_cast<uint64_t>(word);
    const uint64_t low = keep_8_counters(counter, keys, streams, threshold);
    bits[word] = low | static_cast<uint64_t>(keep_8_counters(counter + 8, keys, streams, threshold)) << 32;
  }
}

void transpose(const bf16* x, int64_t ldx, int64_t rows, bf16* y, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 64;  // rows: their cache lines are read again for every column
  for (int64_t from = 0; from < rows; from += kBlock) {
    for (int64_t column = begin; column < end; ++column) {
      for (int64_t row = from; row < smaller(rows, from + kBlock); ++row) y[column * rows + row] = x[row * ldx + column];
    }
  }
}

const RegisterKernels<GemmKernels> register_kernels({&run, &keep_bits, &transpose});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge
