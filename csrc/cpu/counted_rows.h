// The rows of a loss over a linear head that count, with every value that is used as an index or would poison a sum
// checked. Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <cmath>
#include <optional>
#include <vector>

#include "cpu/tensor.h"

namespace forge {

inline void check_vector(const Tensor& x, const char* argument, ScalarType dtype, int64_t length) {
  FORGE_CHECK(x.scalar_type() == dtype && x.dim() == 1 && x.numel() == length, argument,
              toString(x.scalar_type()) << " with " << x.numel() << " elements",
              toString(dtype) << " [" << length << "]");
}

struct CountedRows {
  std::vector<int64_t> rows, targets;
  std::vector<float> weights;
  double weight_sum = 0;

  size_t count() const { return rows.size(); }
};

// Rows whose target is not `ignore_index` and whose weight is not zero, in order. No weights: all ones. `most`: a bound
// for their number that the caller gave.
inline CountedRows count_rows(const Tensor& targets_any, const std::optional<Tensor>& weights_any, int64_t vocab,
                              int64_t ignore_index, const std::optional<int64_t>& most) {
  const int64_t tokens = targets_any.numel();
  const Tensor targets = as_contiguous(targets_any);
  if (weights_any) check_vector(*weights_any, "token_weights", ScalarType::Float, tokens);
  const Tensor weights = weights_any ? as_contiguous(*weights_any) : targets;
  CountedRows counted;
  for (int64_t i = 0; i < tokens; ++i) {
    const float weight = weights_any ? data<float>(weights)[i] : 1.0f;
    FORGE_CHECK(std::isfinite(weight) && weight >= 0, "token_weights", weight << " in row " << i,
                "a finite weight >= 0");
    const int64_t target = data<int64_t>(targets)[i];
    if (target == ignore_index) continue;
    FORGE_CHECK(target >= 0 && target < vocab, "targets", target << " in row " << i,
                "0 <= target < " << vocab << " or ignore_index");
    if (weight == 0) continue;
    counted.rows.push_back(i);
    counted.targets.push_back(target);
    counted.weights.push_back(weight);
    counted.weight_sum += static_cast<double>(weight);
  }
  FORGE_CHECK(!most || static_cast<int64_t>(counted.count()) <= *most, "counted_rows", *most,
              "at least " << counted.count() << ", the number of rows that count");
  return counted;
}

// The values of a float32 vector in the rows that count; they must be finite.
inline std::vector<float> gather_finite(const Tensor& values_any, const char* argument, int64_t tokens,
                                        const CountedRows& counted) {
  check_vector(values_any, argument, ScalarType::Float, tokens);
  const Tensor values = as_contiguous(values_any);
  std::vector<float> gathered(counted.count());
  for (size_t i = 0; i < gathered.size(); ++i) {
    gathered[i] = data<float>(values)[counted.rows[i]];
    FORGE_CHECK(std::isfinite(gathered[i]), argument, gathered[i] << " in row " << counted.rows[i], "a finite number");
  }
  return gathered;
}

// 1 / normalizer, by default 1 / sum of the weights; 0 where nothing counts.
inline double inverse_normalizer(const std::optional<Tensor>& normalizer, const CountedRows& counted) {
  double total = counted.weight_sum;
  if (normalizer) {
    FORGE_CHECK(normalizer->numel() == 1, "normalizer", normalizer->numel() << " elements", "one");
    const Tensor wide = torch::stable::to(*normalizer, ScalarType::Double);
    total = *data<double>(wide);
    FORGE_CHECK(std::isfinite(total) && total >= 0, "normalizer", total, "a finite number >= 0");
  }
  return total > 0 ? 1.0 / total : 0.0;
}

}  // namespace forge
