// lora_linear: y_i = x W_i^T + S_i B_i^T (+ bias_i), S_i = scaling_i * dropout_i(x) A_i^T, for projections i of one x.
//
// Two ops share one contract, which is not that of two independent functions:
//   lora_shrink(x)       -> S = [S_0 | S_1 | ...], [tokens, sum of ranks]
//   lora_matmul(x, S)    -> y_0, y_1, ...
// The backward of lora_matmul returns dS' = scaling * dY B as the "gradient" of S, and the whole
//   dX = sum_i dY_i W_i + dropout_i(dS'_i A_i)
// as the gradient of x. The backward of lora_shrink takes dS' and returns dA = dS'^T dropout(x) only, and no gradient
// for x, because lora_matmul already gave all of it. So scaling enters once in each direction, in the float32 epilogue of
// a skinny matmul, no scaled copy of B or A exists, and autograd adds up nothing of the size of x.
// lora_matmul saves S but not x: under non-reentrant checkpointing, the recomputation of a block ends with lora_shrink
// and does not repeat the block's last matmul.
#include "cpu/lora_linear.h"

namespace forge {
namespace FORGE_ISA {
namespace {

// ---- dropout: Philox4x32-10 (Salmon et al., SC 2011), word e % 4 of counter (e / 4, stream, 0) for element e ----------

constexpr int64_t kChunk = 64;  // counters evaluated together

// words[4 * i + j] = word j of counter first + i.
inline void philox(uint64_t first, uint64_t seed, uint32_t stream, uint32_t* words) {
#pragma omp simd
  for (int64_t i = 0; i < kChunk; ++i) {
    const uint64_t counter = first + static_cast<uint64_t>(i);
    uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = stream, c3 = 0;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p2 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
      c0 = static_cast<uint32_t>(p2 >> 32) ^ c1 ^ key0;
      c1 = static_cast<uint32_t>(p2);
      c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key1;
      c3 = static_cast<uint32_t>(p0);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    words[4 * i] = c0;
    words[4 * i + 1] = c1;
    words[4 * i + 2] = c2;
    words[4 * i + 3] = c3;
  }
}

template <class T, bool kAdd>
void masked(const T* x, T* y, int64_t begin, int64_t end, int64_t elements, uint64_t seed, uint32_t stream,
            uint32_t lowest_kept) {
  uint32_t words[4 * kChunk];
  for (int64_t block = begin; block < end; block += kChunk) {
    philox(static_cast<uint64_t>(block), seed, stream, words);
    const int64_t first = 4 * block, last = 4 * (block + kChunk < end ? block + kChunk : end);
    const int64_t count = (last < elements ? last : elements) - first;
    const T* xs = x + first;
    T* ys = y + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float kept = words[i] >= lowest_kept ? to_float(xs[i]) : 0.0f;
      ys[i] = from_float<T>(kAdd ? to_float(ys[i]) + kept : kept);
    }
  }
}

const RegisterKernels<LoraDropoutKernels<float>> register_float({&masked<float, false>, &masked<float, true>});
const RegisterKernels<LoraDropoutKernels<bf16>> register_bf16({&masked<bf16, false>, &masked<bf16, true>});

// ---- out = s^T x with bfloat16 x and a float32 result, for the gradients of float32 master weights --------------------

#if FORGE_ISA_LEVEL == 2
constexpr int kLanes = 16, kVectors = 4;  // 4 rows x 4 vectors of accumulators
#elif FORGE_ISA_LEVEL == 1
constexpr int kLanes = 8, kVectors = 2;
#else
constexpr int kLanes = 4, kVectors = 2;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));
constexpr int64_t kTokens = 64;  // tokens whose panel of x is unpacked to float32 at a time: 16 KiB

// tile [kRows, kPanel] = s^T x over `tokens` rows of s [., rank] and of x [., kPanel].
template <int kRows>
void tile_product(const float* s, int64_t rank, const Vector* x, int64_t tokens, Vector* tile) {
  constexpr int kPerPanel = kPanel / kLanes;
  for (int column = 0; column < kPerPanel; column += kVectors) {
    Vector sum[kRows][kVectors] = {};
    for (int64_t token = 0; token < tokens; ++token) {
      const Vector* xt = x + token * kPerPanel + column;
      const float* st = s + token * rank;
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[row][v] += st[row] * xt[v];
      }
    }
    for (int row = 0; row < kRows; ++row) {
      for (int v = 0; v < kVectors; ++v) tile[row * kPerPanel + column + v] = sum[row][v];
    }
  }
}

void skinny_tn(const float* s, const bf16* x, float* out, int64_t begin, int64_t end, int64_t tokens, int64_t rank,
               int64_t columns, float scale) {
  alignas(64) float unpacked[kTokens * kPanel];
  alignas(64) float tile[4 * kPanel];
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel;
    const int64_t width = columns - first < kPanel ? columns - first : kPanel;
    for (int64_t row = 0; row < rank; ++row) {
      for (int64_t c = 0; c < width; ++c) out[row * columns + first + c] = 0;
    }
    for (int64_t block = 0; block < tokens; block += kTokens) {
      const int64_t count = tokens - block < kTokens ? tokens - block : kTokens;
      for (int64_t token = 0; token < count; ++token) {
        const bf16* xt = x + (block + token) * columns + first;
        float* target = unpacked + token * kPanel;
#pragma omp simd
        for (int64_t c = 0; c < width; ++c) target[c] = to_float(xt[c]);
        for (int64_t c = width; c < kPanel; ++c) target[c] = 0;
      }
      const Vector* xs = reinterpret_cast<const Vector*>(unpacked);
      Vector* result = reinterpret_cast<Vector*>(tile);
      for (int64_t row = 0; row < rank; row += 4) {
        const int64_t rows = rank - row < 4 ? rank - row : 4;
        const float* sr = s + block * rank + row;
        if (rows == 4) tile_product<4>(sr, rank, xs, count, result);
        if (rows == 3) tile_product<3>(sr, rank, xs, count, result);
        if (rows == 2) tile_product<2>(sr, rank, xs, count, result);
        if (rows == 1) tile_product<1>(sr, rank, xs, count, result);
        for (int64_t r = 0; r < rows; ++r) {
          float* target = out + (row + r) * columns + first;
#pragma omp simd
          for (int64_t c = 0; c < width; ++c) target[c] += scale * tile[r * kPanel + c];
        }
      }
    }
  }
}

const RegisterKernels<LoraSkinnyKernels> register_skinny({&skinny_tn});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/lora_linear_gemm.h"
#include "cpu/lora_linear_torch.h"

namespace forge {
namespace {

// Our own matmul sums base and adapter in one pass; it needs bfloat16 and its dot product.
bool takes_gemm(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 && has_bf16_dot_product(); }

Tensor lora_shrink(const Tensor& x_any, const Tensors& lora_a, const std::vector<double>& scaling, double dropout_p,
                   const std::optional<Tensor>& dropout_seed) {
  check_lengths(lora_a.size(), {scaling.size()});
  const Tensor x = as_contiguous(x_any), a = stacked(lora_a, x.scalar_type());
  const Dropout dropout(dropout_p, dropout_seed);
  const auto run = takes_gemm(x) ? &lora_by_gemm::shrink : &lora_by_torch::shrink;
  return run(x, a, ranks_of(lora_a), scaling, dropout);
}

// dA_i = dS'_i^T dropout_i(x), in float32 where `wide`, else in the dtype of x.
Tensors lora_shrink_backward(const Tensor& ds, const Tensor& x, const std::vector<int64_t>& ranks,
                             const std::vector<bool>& wide, double dropout_p,
                             const std::optional<Tensor>& dropout_seed) {
  check_lengths(ranks.size(), {wide.size()});
  const Dropout dropout(dropout_p, dropout_seed);
  const auto run = takes_gemm(x) ? &lora_by_gemm::shrink_backward : &lora_by_torch::shrink_backward;
  return run(as_contiguous(ds), as_contiguous(x), ranks, wide, dropout);
}

Tensors lora_matmul(const Tensor& x, const Tensor& s, const Tensors& weights, const Tensors& lora_a,
                    const Tensors& lora_b, const Tensors& biases, const std::vector<double>&, double,
                    const std::optional<Tensor>&) {
  check_lengths(weights.size(), {lora_a.size(), lora_b.size(), biases.empty() ? weights.size() : biases.size()});
  const auto run = takes_gemm(x) ? &lora_by_gemm::matmul : &lora_by_torch::matmul;
  return run(as_contiguous(x), as_contiguous(s), weights, lora_b, biases);
}

// dX (empty unless need_dx), dS', and dB_i = dY_i^T S_i in the dtypes of lora_b (none unless need_db).
std::tuple<Tensor, Tensor, Tensors> lora_matmul_backward(const Tensors& dys_any, const Tensor& s,
                                                         const Tensors& weights, const Tensors& lora_a,
                                                         const Tensors& lora_b, const std::vector<double>& scaling,
                                                         double dropout_p, const std::optional<Tensor>& dropout_seed,
                                                         bool need_dx, bool need_db) {
  check_lengths(weights.size(), {dys_any.size(), lora_a.size(), lora_b.size(), scaling.size()});
  const Dropout dropout(dropout_p, dropout_seed);
  Tensors dys;
  for (const Tensor& dy : dys_any) dys.push_back(as_contiguous(dy));
  const auto run = takes_gemm(s) ? &lora_by_gemm::matmul_backward : &lora_by_torch::matmul_backward;
  return run(dys, as_contiguous(s), weights, stacked(lora_a, s.scalar_type()), lora_b, scaling, dropout, need_dx,
             need_db);
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("lora_shrink_backward", TORCH_BOX(&lora_shrink_backward));
  m.impl("lora_matmul", TORCH_BOX(&lora_matmul));
  m.impl("lora_matmul_backward", TORCH_BOX(&lora_matmul_backward));
}

}  // namespace
}  // namespace forge

#endif
