// Checks that both implementations of cross_entropy_rows make; include after the torch headers.
#pragma once

#include <cstdint>
#include <optional>

#include "check.h"
#include "cuda/cross_entropy_row.h"

namespace forge {

// logits float32 [n, vocab] with rows at multiples of 16 bytes, dlogits [n, vocab] float32 or bfloat16 with rows at
// multiples of a pack, sums float64 [clusters, sources, kSums] contiguous.
template <class Tensor>
void check_rows(const Tensor& logits, const std::optional<Tensor>& dlogits, const Tensor& sums, int64_t cluster) {
  using cross_entropy::kPack;
  const auto aligned = [](const Tensor& x, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0 &&
           x.stride(0) * static_cast<int64_t>(x.element_size()) % bytes == 0 && x.stride(1) == 1;
  };
  FORGE_CHECK(logits.dim() == 2 && logits.scalar_type() == torch::headeronly::ScalarType::Float && aligned(logits, 16),
              "logits", "another dtype or layout", "float32 [n, vocab], every row at a multiple of 16 bytes");
  FORGE_CHECK(logits.size(1) < (int64_t{1} << 31) - 64, "logits", logits.size(1) << " columns", "fewer than 2^31 - 64");
  if (dlogits) {
    const auto dtype = dlogits->scalar_type();
    const bool known = dtype == torch::headeronly::ScalarType::Float || dtype == torch::headeronly::ScalarType::BFloat16;
    FORGE_CHECK(known && dlogits->dim() == 2 && dlogits->size(0) == logits.size(0) &&
                    dlogits->size(1) == logits.size(1) &&
                    aligned(*dlogits, kPack * static_cast<int64_t>(dlogits->element_size())),
                "dlogits", "another dtype or layout", "float32 or bfloat16 of the shape of logits, aligned to four elements");
  }
  FORGE_CHECK(sums.dim() == 3 && sums.size(0) >= 1 && sums.size(2) == cross_entropy::kSums && sums.is_contiguous() &&
                  sums.scalar_type() == torch::headeronly::ScalarType::Double,
              "sums", "another dtype or layout", "float64 [clusters, sources, " << cross_entropy::kSums << "]");
  FORGE_CHECK(cluster >= 1 && cluster <= cross_entropy::kMaxCluster && (cluster & (cluster - 1)) == 0, "cluster", cluster,
              "1, 2, 4 or 8 blocks");
}

}  // namespace forge
