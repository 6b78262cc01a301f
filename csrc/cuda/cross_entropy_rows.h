// cross_entropy_rows: loss, statistics per source and gradient of rows of logits. Include after a driver, whose run_rows
// makes it the op of its device.
#pragma once

#include "cuda/logit_rows.h"

namespace forge {
namespace {

struct CrossEntropy {
  static constexpr logit_row::Wanted kWanted = logit_row::Wanted::kPrediction;
  static constexpr int kSums = 5;  // per source: weight * loss, weight * nll, weight, rows, rows predicted

  const float* weights;    // or null
  const int32_t* sources;  // or null
  const double* inverse;   // 1 / normalizer
  double* sums;
  int64_t num_sums;
  float z_loss, smoothing;

  struct Token {
    float scale;  // weight over the normalizer
  };
  FORGE_HOST_DEVICE float weight(int64_t i) const { return weights == nullptr ? 1.0f : weights[i]; }
  FORGE_HOST_DEVICE Token token(int64_t i) const { return {weight(i) * static_cast<float>(*inverse)}; }

  // d(loss)/dy = p * (1 + 2 * z_loss * Z) - smoothing / vocab - (1 - smoothing) * onehot, p = e^(y - top) / exp_sum,
  // Z = top + log(exp_sum).
  FORGE_HOST_DEVICE logit_row::RowGradient gradient(const logit_row::RowPart& row, const Token& token, float,
                                                    int vocab) const {
    const float scale = token.scale, top = row.top();
    float of_exp = scale / row.exp_sum;
    if (z_loss > 0) of_exp *= 1.0f + 2.0f * z_loss * (top + logf(row.exp_sum));
    return {top, of_exp, 0.0f, -scale * smoothing / static_cast<float>(vocab), -scale * (1.0f - smoothing)};
  }

  FORGE_HOST_DEVICE void report(double* all, int64_t i, const logit_row::RowPart& row, const Token&,
                                float y_target, int vocab) const {
    const double w = static_cast<double>(weight(i)), top = static_cast<double>(row.top());
    const double log_sum = logit_row::log_sum(row), log_z = top + log_sum;
    const double nll = log_sum - (static_cast<double>(y_target) - top);
    double loss = nll + static_cast<double>(z_loss) * log_z * log_z;
    if (smoothing > 0) {
      const double mean = static_cast<double>(row.sum) / static_cast<double>(vocab);
      loss += static_cast<double>(smoothing) * ((log_z - mean) - nll);
    }
    double* of_source = all + (sources == nullptr ? 0 : sources[i]) * kSums;
    of_source[0] += w * loss;
    of_source[1] += w * nll;
    of_source[2] += w;
    of_source[3] += 1.0;
    // The target is the first index of the largest logit.
    of_source[4] += y_target >= row.top_from && y_target > row.top_before ? 1.0 : 0.0;
  }
};

void cross_entropy_rows(const Tensor& logits, std::optional<Tensor> dlogits, const Tensor& rows, const Tensor& count,
                        const Tensor& targets, std::optional<Tensor> weights, std::optional<Tensor> sources,
                        const Tensor& inverse, const Tensor& sums, int64_t first, int64_t cluster, double softcap,
                        double z_loss, double label_smoothing) {
  const LogitRows given = logit_rows(logits, dlogits, rows, count, targets, first, cluster, softcap, 1.0);
  FORGE_CHECK(sums.dim() == 3 && sums.size(0) >= 1 && sums.size(2) == CrossEntropy::kSums && sums.is_contiguous() &&
                  sums.scalar_type() == ScalarType::Double,
              "sums", "another dtype or layout", "float64 [clusters, sources, " << CrossEntropy::kSums << "]");
  const int64_t tokens = targets.numel();
  const CrossEntropy job{elements<float>(weights, "token_weights", tokens, ScalarType::Float),
                         elements<int32_t>(sources, "source_ids", tokens, ScalarType::Int),
                         data<double>(inverse),
                         mutable_data<double>(sums),
                         sums.size(1) * CrossEntropy::kSums,
                         static_cast<float>(z_loss),
                         static_cast<float>(label_smoothing)};
  run_rows(job, given, logits, dlogits, cluster, sums.size(0));
}

}  // namespace
}  // namespace forge
