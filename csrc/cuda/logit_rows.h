// What both drivers of a row job take: logit_rows.cuh on GPUs with clusters, logit_rows_cpu.h for tests. Include after
// the headers of torch.
//
// A job is a struct of plain pointers and numbers with
//     kWanted                                          what it wants of a row beside its softmax
//     Token token(index)                               inputs of one token, read before the row is reduced
//     RowGradient gradient(row, token, y_target, vocab)
//     report(sums, index, row, token, y_target, vocab)  called once a row: writes its results, adds to its cluster's sums
//     sums, num_sums                                   float64 [clusters, num_sums], or none
#pragma once

#include <cstdint>
#include <optional>

#include "check.h"
#include "cuda/logit_row.h"

namespace forge {

// Rows [first, first + n) of those that count. `rows` lists their tokens; from `count` on none counts.
struct LogitRows {
  const float* z;
  void* dz;  // may lie over z; null without gradient
  const int32_t* rows;
  const int32_t* count;
  const int64_t* targets;
  int64_t z_stride, dz_stride;
  int first, n, vocab;
  logit_row::Cap cap;
};

// logits float32 [n, vocab] with rows at multiples of 16 bytes, dlogits [n, vocab] float32 or bfloat16 with rows at
// multiples of a pack.
template <class Tensor>
LogitRows logit_rows(const Tensor& logits, const std::optional<Tensor>& dlogits, const Tensor& rows, const Tensor& count,
                     const Tensor& targets, int64_t first, int64_t cluster, double softcap, double scale) {
  using logit_row::kPack;
  using torch::headeronly::ScalarType;
  const auto aligned = [](const Tensor& x, int64_t bytes) {
    return reinterpret_cast<uintptr_t>(x.const_data_ptr()) % bytes == 0 &&
           x.stride(0) * static_cast<int64_t>(x.element_size()) % bytes == 0 && x.stride(1) == 1;
  };
  FORGE_CHECK(logits.dim() == 2 && logits.scalar_type() == ScalarType::Float && aligned(logits, 16), "logits",
              "another dtype or layout", "float32 [n, vocab], every row at a multiple of 16 bytes");
  FORGE_CHECK(logits.size(1) < (int64_t{1} << 31) - 64, "logits", logits.size(1) << " columns", "fewer than 2^31 - 64");
  if (dlogits) {
    const auto dtype = dlogits->scalar_type();
    FORGE_CHECK((dtype == ScalarType::Float || dtype == ScalarType::BFloat16) && dlogits->dim() == 2 &&
                    dlogits->size(0) == logits.size(0) && dlogits->size(1) == logits.size(1) &&
                    aligned(*dlogits, kPack * static_cast<int64_t>(dlogits->element_size())),
                "dlogits", "another dtype or layout", "float32 or bfloat16 of the shape of logits, aligned to four elements");
  }
  FORGE_CHECK(cluster >= 1 && cluster <= logit_row::kMaxCluster && (cluster & (cluster - 1)) == 0, "cluster", cluster,
              "1, 2, 4 or 8 blocks");
  return {static_cast<const float*>(logits.const_data_ptr()),
          dlogits ? dlogits->mutable_data_ptr() : nullptr,
          static_cast<const int32_t*>(rows.const_data_ptr()),
          static_cast<const int32_t*>(count.const_data_ptr()),
          static_cast<const int64_t*>(targets.const_data_ptr()),
          logits.stride(0),
          dlogits ? dlogits->stride(0) : 0,
          static_cast<int>(first),
          static_cast<int>(logits.size(0)),
          static_cast<int>(logits.size(1)),
          {static_cast<float>(softcap), static_cast<float>(scale), static_cast<float>(softcap * scale)}};
}

// The elements of an optional vector of T; null where it is not given, which a job tells by.
template <class T, class Tensor>
T* elements(const std::optional<Tensor>& x, const char* argument, int64_t least, torch::headeronly::ScalarType dtype) {
  if (!x) return nullptr;
  FORGE_CHECK(x->scalar_type() == dtype && x->is_contiguous() && x->numel() >= least, argument,
              toString(x->scalar_type()) << " with " << x->numel() << " elements",
              "contiguous " << toString(dtype) << " with at least " << least);
  return static_cast<T*>(x->mutable_data_ptr());
}

}  // namespace forge
