// The loops of decode_attention.h on the bfloat16 dot product. 16 tokens are scored at a time: their dot products along
// the head dimension are reduced together, 16 registers to one. Values are widened, so that probabilities stay float32.
#include "cpu/decode_attention.h"

#include "cpu/avx512_bf16/transpose.h"

namespace forge {
namespace FORGE_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline void prefetch(const bf16* x) { _mm_prefetch(reinterpret_cast<const char*>(x), _MM_HINT_T0); }

// The sum of each of 16 vectors, in their order.
inline __m512 sums_of_16(__m512 (&x)[16]) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_add_ps(_mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]), _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]));
  }
  __m512 y[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d a = _mm512_castps_pd(x[2 * i]), b = _mm512_castps_pd(x[2 * i + 1]);
    y[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  // y[i] holds four partial sums, one per 128-bit lane, of vectors 4 * i .. 4 * i + 3.
  const __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(y[0], y[1], 0x44), _mm512_shuffle_f32x4(y[0], y[1], 0xee));
  const __m512 second = _mm512_add_ps(_mm512_shuffle_f32x4(y[2], y[3], 0x44), _mm512_shuffle_f32x4(y[2], y[3], 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
}

// Heads of V vectors of 32 elements, the last one masked.
template <int V>
struct Head {
  int64_t d;
  __mmask32 last;

  __m512i load(const bf16* x, int v) const {
    return v + 1 < V ? _mm512_loadu_si512(x + 32 * v) : _mm512_maskz_loadu_epi16(last, x + 32 * v);
  }

  // scores [length] = scale * q k_t; fetches ahead_of_key + t d meanwhile, where it is given.
  void score(const bf16* q, const bf16* key, const bf16* ahead, int64_t length, float scale, float* scores) const {
    __m512bh query[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) query[v] = (__m512bh)load(q, v);
    for (int64_t t = 0; t < length; t += 16) {
      __m512 sum[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int64_t row = smaller(t + i, length - 1) * d;  // never behind the length
        sum[i] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          if (ahead != nullptr) prefetch(ahead + row + 32 * v);
          sum[i] = _mm512_dpbf16_ps(sum[i], query[v], (__m512bh)load(key + row, v));
        }
      }
      const __mmask16 valid = static_cast<__mmask16>(low_bits(length - t < 16 ? length - t : 16));
      _mm512_mask_storeu_ps(scores + t, valid, _mm512_mul_ps(sums_of_16(sum), _mm512_set1_ps(scale)));
    }
  }

  // out [G, d] = sum over t of probabilities[g][t] value_t; fetches ahead + t d meanwhile.
  template <int G>
  void mix(const float* probabilities, int64_t stride, const bf16* value, const bf16* ahead, int64_t length,
           bf16* out) const {
    __m512 even[G][V], odd[G][V];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) even[g][v] = odd[g][v] = _mm512_setzero_ps();
    }
    for (int64_t t = 0; t < length; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        if (ahead != nullptr) prefetch(ahead + t * d + 32 * v);
        const __m512i pairs = load(value + t * d, v);
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
          const __m512 p = _mm512_set1_ps(probabilities[g * stride + t]);
          even[g][v] = _mm512_fmadd_ps(p, low, even[g][v]);
          odd[g][v] = _mm512_fmadd_ps(p, high, odd[g][v]);
        }
      }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even[g][v]));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd[g][v]));
        _mm512_mask_storeu_epi16(out + g * d + 32 * v, v + 1 < V ? ~__mmask32{0} : last,
                                 _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }
};

template <int V>
void run_tasks(const DecodeShape& s, const bf16* q, int64_t q_stride, const bf16* keys, const bf16* values,
               const int64_t* lengths, bf16* out, int64_t out_stride, float* scores, int64_t begin, int64_t end) {
  constexpr int kHeads = V <= 2 ? 4 : (V <= 4 ? 2 : 1);  // heads whose sums fit the registers
  const int64_t d = s.d, group = s.q_heads / s.kv_heads;
  const Head<V> head{d, static_cast<__mmask32>(low_bits(d - 32 * (V - 1)))};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t sequence = task / s.kv_heads, kv = task % s.kv_heads, last = lengths[sequence];
    const int64_t first = s.window > 0 && last > s.window ? last - s.window : 0, length = last - first;
    const int64_t row = ((sequence * s.kv_heads + kv) * s.capacity + first) * d;
    const bf16* queries = q + sequence * q_stride + kv * group * d;
    bf16* outs = out + sequence * out_stride + kv * group * d;
    for (int64_t g = 0; g < group; ++g) {
      float* own = scores + g * s.capacity;
      head.score(queries + g * d, keys + row, g == 0 ? values + row : nullptr, length, s.scale, own);
      to_probabilities(s.softcap, own, length);
    }
    const bf16* next = keys + row + s.capacity * d;  // of the next task; only fetched, so it may lie outside
    int64_t g = 0;
    for (; g + kHeads <= group; g += kHeads) {
      head.template mix<kHeads>(scores + g * s.capacity, s.capacity, values + row, g == 0 ? next : nullptr, length,
                                outs + g * d);
    }
    if (group - g == 3 && kHeads > 3) {
      head.template mix<3>(scores + g * s.capacity, s.capacity, values + row, g == 0 ? next : nullptr, length,
                           outs + g * d);
      g = group;
    }
    for (; g < group; ++g) {
      head.template mix<1>(scores + g * s.capacity, s.capacity, values + row, g == 0 ? next : nullptr, length,
                           outs + g * d);
    }
  }
}

void run(const DecodeShape& s, const bf16* q, int64_t q_stride, const bf16* keys, const bf16* values,
         const int64_t* lengths, bf16* out, int64_t out_stride, float* scratch, int64_t begin, int64_t end) {
  constexpr decltype(&run_tasks<1>) kTasks[8] = {&run_tasks<1>, &run_tasks<2>, &run_tasks<3>, &run_tasks<4>,
                                                 &run_tasks<5>, &run_tasks<6>, &run_tasks<7>, &run_tasks<8>};
  // Larger heads than 256, which no model has, run the loops without the dot product.
  const auto tasks = s.d <= 256 ? kTasks[(s.d - 1) / 32] : IsaTable<DecodeAttentionKernels<bf16>>::entries[2].run;
  tasks(s, q, q_stride, keys, values, lengths, out, out_stride, scratch, begin, end);
}

const RegisterKernels<DecodeAttentionKernels<bf16>> register_kernels({&run});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge
