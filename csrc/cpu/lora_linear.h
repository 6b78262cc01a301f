// What the files of lora_linear share: its loops' tables, dropout, and the handling of lists of adapters.
#pragma once

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

}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include <cmath>
#include <optional>

#include "cpu/tensor.h"

namespace forge {

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

  // What the adapter of projection `stream` sees of x, or adds to y.
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

inline Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return as_contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

inline Tensor columns_of(const Tensor& x, int64_t start, int64_t length) {
  Tensor view = x;
  return torch::stable::narrow(view, 1, start, length);
}

inline Tensor rows_of(const Tensor& x, int64_t start, int64_t length) {
  Tensor view = x;
  return torch::stable::narrow(view, 0, start, length);
}

// All adapters' A below one another, in the dtype of the matmuls: [sum of ranks, in].
inline Tensor stacked(const Tensors& lora_a, ScalarType dtype) {
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

inline void check_lengths(size_t length, std::initializer_list<size_t> others) {
  for (const size_t other : others) {
    FORGE_CHECK(length > 0 && other == length, "lists", other << " entries", length << ", one per projection");
  }
}

template <class T>
bool all_equal(const std::vector<T>& values) {
  return values == std::vector<T>(values.size(), values[0]);
}

inline std::vector<int64_t> ranks_of(const Tensors& lora_a) {
  std::vector<int64_t> ranks;
  for (const Tensor& a : lora_a) ranks.push_back(a.size(0));
  return ranks;
}

// The rows of x for each projection, as tensors of their own.
inline Tensors slices(const Tensor& x, const std::vector<int64_t>& ranks) {
  if (ranks.size() == 1) return {x};
  Tensors parts;
  int64_t start = 0;
  for (const int64_t rank : ranks) {
    parts.push_back(torch::stable::clone(rows_of(x, start, rank)));
    start += rank;
  }
  return parts;
}

}  // namespace forge

#endif
