// token_logprob_rows: log-probability of the target and entropy of rows of logits, and the gradient of whatever is made
// of the two: of given gradients, or of a policy objective whose ratio belongs to the token. Include after a driver, whose
// run_rows makes it the op of its device.
#pragma once

#include "cuda/logit_rows.h"

namespace forge {
namespace {

struct TokenLogprobs {
  static constexpr logit_row::Wanted kWanted = logit_row::Wanted::kEntropy;
  enum Objective : int { kClip, kCispo, kReinforce };  // as in kernels/gpu/policy_gradient_loss.py

  // Results by token; null: not wanted.
  double *logprob, *log_ratio;
  float* entropy;
  // The gradient is made either of these two
  const float *dlogprob, *dentropy;
  // or of an objective; null: ratio 1, no reference, weights of 1.
  const float *advantages, *old, *ref, *weights;
  const double* inverse;  // 1 / normalizer
  int objective;
  float lower, upper;  // bounds of the ratio
  float kl_coef, entropy_coef;
  static constexpr double* sums = nullptr;
  static constexpr int64_t num_sums = 0;

  struct Token {
    float of_logprob;  // advantage, or the gradient of the log-probability
    float of_entropy;  // weight over the normalizer, or the gradient of the entropy
    float old, ref;
  };
  FORGE_HOST_DEVICE static float value(const float* values, int64_t i, float otherwise) {
    return values == nullptr ? otherwise : values[i];
  }
  FORGE_HOST_DEVICE Token token(int64_t i) const {
    if (dlogprob != nullptr) return {dlogprob[i], dentropy[i], 0.0f, 0.0f};
    const float factor = inverse == nullptr ? 0.0f : static_cast<float>(*inverse);
    return {value(advantages, i, 0.0f), value(weights, i, 1.0f) * factor, value(old, i, 0.0f), value(ref, i, 0.0f)};
  }

  // d(objective)/d(log-ratio); without a gradient through the ratio, d(objective)/d(logprob).
  FORGE_HOST_DEVICE float slope(float log_ratio, float advantage) const {
    if (objective == kReinforce) return -advantage;
    const float ratio = logit_row::exponential(log_ratio);
    const bool below = ratio < lower, above = ratio > upper;
    if (objective == kCispo) return -(below ? lower : above ? upper : ratio) * advantage;
    // -min(ratio * A, bounded * A): the bound holds only where it makes the objective smaller.
    return (below && advantage < 0) || (above && advantage > 0) ? 0.0f : -ratio * advantage;
  }

  FORGE_HOST_DEVICE double log_ratio_of(double logprob_of_row, const Token& token) const {
    return old == nullptr ? 0.0 : logprob_of_row - static_cast<double>(token.old);
  }

  // d(logprob)/dy = onehot - p and d(entropy)/dy = -p * (log p + entropy), where log p + entropy = (y - top) - mean with
  // the mean of y - top under p.
  FORGE_HOST_DEVICE logit_row::RowGradient gradient(const logit_row::RowPart& row, const Token& token, float y_target,
                                                    int) const {
    float g = token.of_logprob, h = token.of_entropy;
    if (dlogprob == nullptr) {
      const double exact = logit_row::logprob(row, y_target);
      g = slope(static_cast<float>(log_ratio_of(exact, token)), token.of_logprob);
      if (ref != nullptr) g += kl_coef * (1.0f - logit_row::exponential(token.ref - static_cast<float>(exact)));
      g *= token.of_entropy;
      h = -token.of_entropy * entropy_coef;
    }
    const float mean = row.sum / row.exp_sum;
    return {row.top(), (h * mean - g) / row.exp_sum, -h / row.exp_sum, 0.0f, g};
  }

  FORGE_HOST_DEVICE void report(double*, int64_t i, const logit_row::RowPart& row, const Token& token, float y_target,
                                int) const {
    if (logprob == nullptr) return;
    const double exact = logit_row::logprob(row, y_target);
    logprob[i] = exact;
    entropy[i] = static_cast<float>(logit_row::log_sum(row) - static_cast<double>(row.sum / row.exp_sum));
    if (log_ratio != nullptr) log_ratio[i] = log_ratio_of(exact, token);
  }
};

void token_logprob_rows(const Tensor& logits, std::optional<Tensor> dlogits, const Tensor& rows, const Tensor& count,
                        const Tensor& targets, std::optional<Tensor> logprob, std::optional<Tensor> entropy,
                        std::optional<Tensor> log_ratio, std::optional<Tensor> dlogprob, std::optional<Tensor> dentropy,
                        std::optional<Tensor> advantages, std::optional<Tensor> old_logprobs,
                        std::optional<Tensor> ref_logprobs, std::optional<Tensor> weights,
                        std::optional<Tensor> inverse, int64_t objective, double lower, double upper, double kl_coef,
                        double entropy_coef, double softcap, double temperature, int64_t first, int64_t cluster,
                        int64_t clusters) {
  const LogitRows given = logit_rows(logits, dlogits, rows, count, targets, first, cluster, softcap, 1.0 / temperature);
  FORGE_CHECK(logprob.has_value() == entropy.has_value() && (logprob || !log_ratio), "entropy", "one of two results",
              "logprob and entropy, with or without log_ratio, or none of the three");
  FORGE_CHECK(dlogprob.has_value() == dentropy.has_value(), "dentropy", "one of two gradients", "both or none");
  FORGE_CHECK(!dlogits || dlogprob || (advantages && inverse), "dlogits", "nothing to make it of",
              "dlogprob and dentropy, or advantages and inverse");
  const int64_t tokens = targets.numel();
  const auto values = [&](const std::optional<Tensor>& x, const char* argument) {
    return elements<float>(x, argument, tokens, ScalarType::Float);
  };
  const TokenLogprobs job{elements<double>(logprob, "logprob", tokens, ScalarType::Double),
                          elements<double>(log_ratio, "log_ratio", tokens, ScalarType::Double),
                          values(entropy, "entropy"),
                          values(dlogprob, "dlogprob"),
                          values(dentropy, "dentropy"),
                          values(advantages, "advantages"),
                          values(old_logprobs, "old_logprobs"),
                          values(ref_logprobs, "ref_logprobs"),
                          values(weights, "token_weights"),
                          elements<double>(inverse, "inverse", 1, ScalarType::Double),
                          static_cast<int>(objective),
                          static_cast<float>(lower),
                          static_cast<float>(upper),
                          static_cast<float>(kl_coef),
                          static_cast<float>(entropy_coef)};
  run_rows(job, given, logits, dlogits, cluster, clusters);
}

}  // namespace
}  // namespace forge
