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
#include "cpu/vec.h"

namespace forge {

template <class T>
struct LoraDropoutKernels {
  // Blocks of four elements [begin, end) of x [elements]: y = kept ? x : 0. y may be x.
  void (*mask)(const T* x, T* y, int64_t begin, int64_t end, int64_t elements, uint64_t seed, uint32_t stream,
               uint32_t lowest_kept);
  // y += kept ? x : 0.
  void (*add_masked)(const T* x, T* y, int64_t begin, int64_t end, int64_t elements, uint64_t seed, uint32_t stream,
                     uint32_t lowest_kept);
};

constexpr int64_t kPanel = 64;  // columns of one task of skinny_tn

struct LoraSkinnyKernels {
  // Panels [begin, end) of kPanel columns: out [rank, columns] = scale * s^T x, s [tokens, rank], x [tokens, columns].
  void (*skinny_tn)(const float* s, const bf16* x, float* out, int64_t begin, int64_t end, int64_t tokens, int64_t rank,
                    int64_t columns, float scale);
};

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

#include <cmath>
#include <optional>

#include "cpu/tensor.h"

namespace forge {
namespace {

using Tensors = std::vector<Tensor>;

// p = 0 is given as no seed.
struct Dropout {
  bool active = false;
  double p = 0;
  uint64_t seed = 0;
  uint32_t lowest_kept = 0;  // an element is kept when its random word is at least this

  Dropout(double probability, const std::optional<Tensor>& seed_tensor) {
    if (!seed_tensor.has_value()) return;
    FORGE_CHECK(seed_tensor->scalar_type() == ScalarType::Long && seed_tensor->numel() == 1, "dropout_seed",
                "another tensor", "an int64 scalar");
    FORGE_CHECK(probability >= 0 && probability < 1, "dropout_p", probability, "a probability in [0, 1)");
    active = true;
    p = probability;
    seed = static_cast<uint64_t>(*data<int64_t>(*seed_tensor));
    lowest_kept = static_cast<uint32_t>(std::fmin(std::nearbyint(probability * 4294967296.0), 4294967295.0));
  }

  // What kept elements are multiplied by: folded into the matmuls, so that masking itself rounds nothing.
  double factor() const { return active ? 1 / (1 - p) : 1.0; }

  void apply(const Tensor& x, const Tensor& y, int64_t stream, bool add) const {
    const int64_t elements = x.numel();
    dispatch_float_bf16(x, "x", [&]<class T>() {
      torch::stable::parallel_for(0, (elements + 3) / 4, 4096, [&](int64_t begin, int64_t end) {
        const auto& loops = kernels<LoraDropoutKernels<T>>();
        (add ? loops.add_masked : loops.mask)(data<T>(x), mutable_data<T>(y), begin, end, elements, seed,
                                              static_cast<uint32_t>(stream), lowest_kept);
      });
    });
  }
};

Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return as_contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

Tensor columns_of(const Tensor& x, int64_t start, int64_t length) {
  Tensor view = x;
  return torch::stable::narrow(view, 1, start, length);
}

Tensor rows_of(const Tensor& x, int64_t start, int64_t length) {
  Tensor view = x;
  return torch::stable::narrow(view, 0, start, length);
}

// All adapters' A below one another, in the dtype of the matmuls: [sum of ranks, in].
Tensor stacked(const Tensors& lora_a, ScalarType dtype) {
  if (lora_a.size() == 1) return in_dtype(lora_a[0], dtype);
  int64_t rows = 0;
  for (const Tensor& a : lora_a) rows += a.size(0);
  Tensor result = new_tensor({rows, lora_a[0].size(1)}, dtype);
  int64_t start = 0;
  for (const Tensor& a : lora_a) {
    Tensor part = rows_of(result, start, a.size(0));
    torch::stable::copy_(part, a);
    start += a.size(0);
  }
  return result;
}

void check_lengths(size_t length, std::initializer_list<size_t> others) {
  for (const size_t other : others) {
    FORGE_CHECK(length > 0 && other == length, "lists", other << " entries", length << ", one per projection");
  }
}

bool all_equal(const std::vector<double>& values) {
  for (double value : values) {
    if (value != values[0]) return false;
  }
  return true;
}

// scale * s^T x for s [tokens, rank] and x [tokens, columns]: [rank, columns] in `dtype`. A float32 result of bfloat16
// inputs is never rounded to bfloat16.
Tensor transposed_product(const Tensor& s, const Tensor& x, double scale, ScalarType dtype) {
  const int64_t rank = s.size(1), columns = x.size(1);
  FORGE_CHECK(s.size(0) == x.size(0), "tokens", s.size(0), x.size(0));
  Tensor out = new_tensor({rank, columns}, dtype);
  if (dtype == x.scalar_type()) {
    addmm_(out, transposed(s), x, 0.0, scale);
    return out;
  }
  FORGE_CHECK(dtype == ScalarType::Float && x.scalar_type() == ScalarType::BFloat16, "lora_a, lora_b",
              toString(dtype), "the dtype of x, or float32 with bfloat16 x");
  const Tensor wide = in_dtype(s, ScalarType::Float);
  active_isa_level();  // complains here about a wrong FORGE_CPU_ISA
  torch::stable::parallel_for(0, (columns + kPanel - 1) / kPanel, 1, [&](int64_t begin, int64_t end) {
    kernels<LoraSkinnyKernels>().skinny_tn(data<float>(wide), data<bf16>(x), mutable_data<float>(out), begin, end,
                                           x.size(0), rank, columns, static_cast<float>(scale));
  });
  return out;
}

Tensor lora_shrink(const Tensor& x_any, const Tensors& lora_a, const std::vector<double>& scaling, double dropout_p,
                   const std::optional<Tensor>& dropout_seed) {
  check_lengths(lora_a.size(), {scaling.size()});
  const Tensor x = as_contiguous(x_any), a = stacked(lora_a, x.scalar_type());
  const Dropout dropout(dropout_p, dropout_seed);
  Tensor s = new_tensor({x.size(0), a.size(0)}, x.scalar_type());
  if (!dropout.active && all_equal(scaling)) {
    addmm_(s, x, transposed(a), 0.0, scaling[0]);
    return s;
  }
  Tensor dropped = dropout.active ? torch::stable::empty_like(x) : x;
  int64_t start = 0;
  for (size_t i = 0; i < lora_a.size(); ++i) {
    const int64_t rank = lora_a[i].size(0);
    if (dropout.active) dropout.apply(x, dropped, static_cast<int64_t>(i), false);
    addmm_(columns_of(s, start, rank), dropped, transposed(rows_of(a, start, rank)), 0.0,
           scaling[i] * dropout.factor());
    start += rank;
  }
  return s;
}

// dA_i = dS'_i^T dropout_i(x), in the dtype of the adapters.
Tensors lora_shrink_backward(const Tensor& ds_any, const Tensor& x_any, const std::vector<int64_t>& ranks,
                             const std::vector<bool>& wide, double dropout_p,
                             const std::optional<Tensor>& dropout_seed) {
  check_lengths(ranks.size(), {wide.size()});
  const Tensor ds = as_contiguous(ds_any), x = as_contiguous(x_any);
  const Dropout dropout(dropout_p, dropout_seed);
  Tensor dropped = dropout.active ? torch::stable::empty_like(x) : x;
  Tensors das;
  int64_t start = 0;
  if (!dropout.active && wide == std::vector<bool>(wide.size(), wide[0])) {
    const Tensor all = transposed_product(ds, x, 1.0, wide[0] ? ScalarType::Float : x.scalar_type());
    if (ranks.size() == 1) return {all};
    for (const int64_t rank : ranks) {
      das.push_back(torch::stable::clone(rows_of(all, start, rank)));
      start += rank;
    }
    return das;
  }
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (dropout.active) dropout.apply(x, dropped, static_cast<int64_t>(i), false);
    das.push_back(transposed_product(columns_of(ds, start, ranks[i]), dropped, dropout.factor(),
                                     wide[i] ? ScalarType::Float : x.scalar_type()));
    start += ranks[i];
  }
  return das;
}

Tensors lora_matmul(const Tensor& x_any, const Tensor& s_any, const Tensors& weights, const Tensors& lora_a,
                    const Tensors& lora_b, const Tensors& biases, const std::vector<double>&, double,
                    const std::optional<Tensor>&) {
  check_lengths(weights.size(), {lora_a.size(), lora_b.size(), biases.empty() ? weights.size() : biases.size()});
  const Tensor x = as_contiguous(x_any), s = as_contiguous(s_any);
  Tensors ys;
  int64_t start = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t rank = lora_a[i].size(0);
    const Tensor si = columns_of(s, start, rank), bt = transposed(in_dtype(lora_b[i], x.scalar_type()));
    Tensor y = new_tensor({x.size(0), weights[i].size(0)}, x.scalar_type());
    // The small term first: it is rounded once while it is small, and the large sum once.
    if (biases.empty()) {
      mm_out(y, si, bt);
    } else {
      addmm_out(y, biases[i], si, bt);
    }
    addmm_(y, x, transposed(weights[i]));
    ys.push_back(y);
    start += rank;
  }
  return ys;
}

// dX (empty unless need_dx), dS', and dB_i = dY_i^T S_i in the dtypes of lora_b (none unless need_db).
std::tuple<Tensor, Tensor, Tensors> lora_matmul_backward(const Tensors& dys_any, const Tensor& s_any,
                                                         const Tensors& weights, const Tensors& lora_a,
                                                         const Tensors& lora_b, const std::vector<double>& scaling,
                                                         double dropout_p, const std::optional<Tensor>& dropout_seed,
                                                         bool need_dx, bool need_db) {
  check_lengths(weights.size(), {dys_any.size(), lora_a.size(), lora_b.size(), scaling.size()});
  const Tensor s = as_contiguous(s_any);
  const ScalarType dtype = s.scalar_type();
  const Dropout dropout(dropout_p, dropout_seed);
  const int64_t tokens = s.size(0), features = weights[0].size(1);
  const Tensor a = stacked(lora_a, dtype);
  Tensor ds = new_tensor({tokens, s.size(1)}, dtype);
  Tensors dys, dbs;
  int64_t start = 0;
  for (size_t i = 0; i < dys_any.size(); ++i) {
    const int64_t rank = lora_a[i].size(0);
    dys.push_back(as_contiguous(dys_any[i]));
    addmm_(columns_of(ds, start, rank), dys[i], in_dtype(lora_b[i], dtype), 0.0, scaling[i]);
    if (need_db) {
      const Tensor si = columns_of(s, start, rank);
      if (lora_b[i].scalar_type() == dtype) {
        dbs.push_back(transposed_product(dys[i], si, 1.0, dtype));
      } else {
        dbs.push_back(as_contiguous(transposed(transposed_product(si, dys[i], 1.0, ScalarType::Float))));
      }
    }
    start += rank;
  }
  if (!need_dx) return {new_tensor({0}, dtype), ds, dbs};

  Tensor dx = new_tensor({tokens, features}, dtype);
  if (!dropout.active) {
    mm_out(dx, ds, a);
  } else {
    Tensor part = dys.size() > 1 ? torch::stable::empty_like(dx) : dx;
    start = 0;
    for (size_t i = 0; i < dys.size(); ++i) {
      const int64_t rank = lora_a[i].size(0);
      const Tensor& target = i == 0 ? dx : part;
      addmm_(target, columns_of(ds, start, rank), rows_of(a, start, rank), 0.0, dropout.factor());
      dropout.apply(target, dx, static_cast<int64_t>(i), i != 0);
      start += rank;
    }
  }
  for (size_t i = 0; i < dys.size(); ++i) addmm_(dx, dys[i], weights[i]);
  return {dx, ds, dbs};
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
