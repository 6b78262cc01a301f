// policy_gradient_loss: what a token's loss is depends on its own logits alone. Over a frozen bfloat16 head they are
// never in memory (streamed_rows.h); otherwise a row's dlogits are written over its logits while they are in the
// second-level cache. One matmul for the logits and one for each gradient. With a ratio per sequence the gradient waits
// for the sequence's last token. Over a frozen head and without an entropy bonus only a factor of the row does: dhidden
// is made for the factor 1 and scaled at the end. Otherwise the logits are computed a second time.
#include "cpu/token_logprobs.h"

#if FORGE_ISA_LEVEL == 0

#include <cmath>
#include <string>
#include <string_view>

#include "cpu/counted_rows.h"
#include "cpu/linear_head.h"
#include "cpu/streamed_rows.h"

namespace forge {
namespace {

enum class Objective { kClip, kSequenceClip, kCispo, kReinforce };

Objective parse_objective(std::string_view name) {
  if (name == "clip") return Objective::kClip;
  if (name == "sequence_clip") return Objective::kSequenceClip;
  if (name == "cispo") return Objective::kCispo;
  FORGE_CHECK(name == "reinforce", "objective", name, "clip, sequence_clip, cispo or reinforce");
  return Objective::kReinforce;
}

struct PolicyOptions {
  Objective objective;
  double lower, upper;  // bounds of the ratio
  double kl_coef, entropy_coef;
};

// What the policy objective alone makes of one token: its loss and d(loss)/d(log-ratio). In the objectives without a
// gradient through the ratio the latter is d(loss)/d(logprob).
struct PolicyTerm {
  double loss, slope, log_ratio;
  bool clipped_low, clipped_high;
};

PolicyTerm policy_term(const PolicyOptions& options, double advantage, double log_ratio, double logprob) {
  if (options.objective == Objective::kReinforce) return {-advantage * logprob, -advantage, log_ratio, false, false};
  const double ratio = std::exp(log_ratio);
  const bool below = ratio < options.lower, above = ratio > options.upper;
  const double bounded = below ? options.lower : (above ? options.upper : ratio);
  if (options.objective == Objective::kCispo) {
    const bool counts = advantage != 0;
    return {-bounded * advantage * logprob, -bounded * advantage, log_ratio, below && counts, above && counts};
  }
  // -min(ratio * A, bounded * A): the bound holds only where it makes the objective smaller.
  const bool low = below && advantage < 0, high = above && advantage > 0;
  if (low || high) return {-bounded * advantage, 0.0, log_ratio, low, high};
  return {-ratio * advantage, -ratio * advantage, log_ratio, false, false};
}

// k3 (Schulman, "Approximating KL divergence"): e^d - d - 1 >= 0.
double k3(double d) { return std::exp(d) - d - 1.0; }

// The rows that count, with their inputs, softmax and gradients.
struct PolicyRows {
  const CountedRows& counted;
  PolicyOptions options;
  double inverse;                                         // 1 / normalizer
  std::vector<float> advantage, old_logprob, ref_logprob;  // the last two empty where not given
  std::vector<double> logprob;
  std::vector<float> entropy, max, exp_sum, dlogprob, dentropy;
  std::vector<PolicyTerm> term;

  double log_ratio(size_t i) const {
    return old_logprob.empty() ? 0.0 : logprob[i] - static_cast<double>(old_logprob[i]);
  }

  double ref_difference(size_t i) const {
    return ref_logprob.empty() ? 0.0 : static_cast<double>(ref_logprob[i]) - logprob[i];
  }

  double weight(size_t i) const { return static_cast<double>(counted.weights[i]); }

  void set_term(size_t i, double log_ratio) {
    term[i] = policy_term(options, static_cast<double>(advantage[i]), log_ratio, logprob[i]);
  }

  // `slope`: derivative of the weighted policy objective by this token's logprob.
  void set_gradient(size_t i, double slope) {
    if (options.kl_coef != 0) slope += weight(i) * options.kl_coef * (1.0 - std::exp(ref_difference(i)));
    dlogprob[i] = static_cast<float>(inverse * slope);
    dentropy[i] = static_cast<float>(-inverse * weight(i) * options.entropy_coef);
  }

  void finish_token(size_t i) {
    set_term(i, log_ratio(i));
    set_gradient(i, weight(i) * term[i].slope);
  }

  // The ratio of a sequence is the geometric mean of its tokens' ratios.
  void finish_sequences(const int32_t* cu_seqlens, int64_t documents) {
    size_t begin = 0, end = 0;
    for (int64_t document = 0; document < documents; ++document, begin = end) {
      double sum = 0, slope = 0;
      for (; end < counted.count() && counted.rows[end] < cu_seqlens[document + 1]; ++end) sum += log_ratio(end);
      const double length = static_cast<double>(end - begin);
      for (size_t i = begin; i < end; ++i) {
        set_term(i, sum / length);
        slope += weight(i) * term[i].slope;
      }
      for (size_t i = begin; i < end; ++i) set_gradient(i, slope / length);
    }
    FORGE_CHECK(end == counted.count(), "cu_seqlens",
                "an end of " << cu_seqlens[documents] << " before row " << counted.rows[end] << ", which counts",
                "every row that counts inside a document");
  }
};

int64_t check_cu_seqlens(const Tensor& cu_seqlens, int64_t tokens) {
  FORGE_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0,
              "cu_seqlens", toString(cu_seqlens.scalar_type()) << " with " << cu_seqlens.numel() << " elements",
              "int32 [documents + 1]");
  const int32_t* offsets = data<int32_t>(cu_seqlens);
  const int64_t documents = cu_seqlens.numel() - 1;
  bool ok = offsets[0] == 0 && offsets[documents] <= tokens;
  for (int64_t i = 0; i < documents; ++i) ok = ok && offsets[i] <= offsets[i + 1];
  FORGE_CHECK(ok, "cu_seqlens", "other offsets",
              "offsets that start at 0, never decrease and end at most at " << tokens << ", the number of tokens");
  return documents;
}

// counts int64 [3]: token_count, clipped_low, clipped_high; sums float32 [5]: entropy_sum, kl_sum, old_kl_sum,
// ratio_sum, max_abs_log_ratio. Returns sum of w * token loss. Row by row in double, whatever the chunks and threads.
double report(const PolicyRows& rows, int64_t* counts, float* sums) {
  double loss = 0, entropy = 0, kl = 0, old_kl = 0, ratio = 0, largest = 0;
  counts[0] = static_cast<int64_t>(rows.counted.count());
  for (size_t i = 0; i < rows.counted.count(); ++i) {
    const PolicyTerm& term = rows.term[i];
    const double row_kl = k3(rows.ref_difference(i)), row_entropy = static_cast<double>(rows.entropy[i]);
    loss += rows.weight(i) * (term.loss + rows.options.kl_coef * row_kl - rows.options.entropy_coef * row_entropy);
    counts[1] += term.clipped_low ? 1 : 0;
    counts[2] += term.clipped_high ? 1 : 0;
    entropy += row_entropy;
    kl += row_kl;
    old_kl += k3(rows.log_ratio(i));
    ratio += std::exp(term.log_ratio);
    largest = std::fabs(term.log_ratio) > largest ? std::fabs(term.log_ratio) : largest;
  }
  const double values[] = {entropy, kl, old_kl, ratio, largest};
  for (int i = 0; i < 5; ++i) sums[i] = static_cast<float>(values[i]);
  return loss;
}

// Row rows[i] of x times factor[i].
void scale_rows(const Tensor& x, const std::vector<int64_t>& rows, const std::vector<float>& factor) {
  const int64_t width = x.size(1);
  torch::stable::parallel_for(0, static_cast<int64_t>(rows.size()), 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      bf16* row = mutable_data<bf16>(x) + rows[static_cast<size_t>(i)] * width;
      const float by = factor[static_cast<size_t>(i)];
      for (int64_t j = 0; j < width; ++j) row[j] = FORGE_ISA::from_float<bf16>(FORGE_ISA::to_float(row[j]) * by);
    }
  });
}

template <class T>
std::tuple<Tensor, Tensor> run(const Tensor& hidden, const Tensor& lm_head, const Tensor& cu_seqlens,
                               int64_t documents, PolicyRows& rows, float softcap, float temperature,
                               bool need_dhidden, bool need_dhead) {
  const bool gradient = need_dhidden || need_dhead;
  const bool by_sequence = rows.options.objective == Objective::kSequenceClip;
  if (head_can_stream(hidden) && !need_dhead && !(need_dhidden && rows.options.entropy_coef != 0)) {
    const Tensor dhidden =
        stream_rows(hidden, lm_head, rows.counted.rows, rows.counted.targets, softcap, temperature, need_dhidden,
                    [&](int64_t row, const StreamedRow& softmax) {
                      const size_t i = static_cast<size_t>(row);
                      rows.logprob[i] = softmax.logprob;
                      rows.entropy[i] = static_cast<float>(softmax.entropy);
                      if (by_sequence) return StreamedGradient{-1.0, 1.0};
                      rows.finish_token(i);
                      const double slope = static_cast<double>(rows.dlogprob[i]);
                      return StreamedGradient{-slope, slope};
                    });
    if (by_sequence) {
      rows.finish_sequences(data<int32_t>(cu_seqlens), documents);
      if (need_dhidden) scale_rows(dhidden, rows.counted.rows, rows.dlogprob);
    }
    return {dhidden, new_tensor({0}, hidden.scalar_type())};
  }
  const auto& loops = kernels<TokenLogprobKernels<T>>();
  LinearHeadChunks<T> chunks(hidden, lm_head, rows.counted.rows, need_dhidden, need_dhead);
  const auto rows_of = [&](int64_t chunk, float* z) {
    const int64_t first = chunks.first(chunk);
    return TokenLogprobRows{z, chunks.stride(), lm_head.size(0), rows.counted.targets.data() + first, softcap,
                            temperature, rows.logprob.data() + first, rows.entropy.data() + first,
                            rows.max.data() + first, rows.exp_sum.data() + first};
  };
  const auto write_dlogits = [&](const TokenLogprobRows& block, int64_t first, bool scaled, int64_t begin,
                                 int64_t end) {
    loops.backward(block, rows.dlogprob.data() + first, rows.dentropy.data() + first, scaled, begin, end);
  };

  for (int64_t chunk = 0; chunk < chunks.chunks(); ++chunk) {
    const TokenLogprobRows block = rows_of(chunk, chunks.logits(chunk));
    const int64_t first = chunks.first(chunk);
    torch::stable::parallel_for(0, chunks.size(chunk), 1, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        loops.forward(block, row, row + 1);
        if (by_sequence) continue;
        const size_t i = static_cast<size_t>(first + row);
        rows.finish_token(i);
        if (gradient) write_dlogits(block, first, true, row, row + 1);
      }
    });
    if (gradient && !by_sequence) chunks.backward(chunk);
  }
  if (by_sequence) {
    rows.finish_sequences(data<int32_t>(cu_seqlens), documents);
    for (int64_t chunk = 0; chunk < chunks.chunks() && gradient; ++chunk) {
      const TokenLogprobRows block = rows_of(chunk, chunks.logits(chunk));
      torch::stable::parallel_for(0, chunks.size(chunk), 1, [&](int64_t begin, int64_t end) {
        write_dlogits(block, chunks.first(chunk), false, begin, end);
      });
      chunks.backward(chunk);
    }
  }
  return {chunks.dhidden(), chunks.dhead()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_gradient_loss(
    const Tensor& hidden_any, const Tensor& lm_head_any, const Tensor& targets, const Tensor& advantages,
    std::optional<Tensor> old_logprobs, std::optional<Tensor> ref_logprobs, std::optional<Tensor> token_weights,
    std::optional<Tensor> cu_seqlens, std::optional<Tensor> normalizer, std::string objective, double clip_low,
    double clip_high, double kl_coef, double entropy_coef, double temperature, double softcap, int64_t ignore_index,
    std::optional<int64_t> counted_rows, bool need_dhidden, bool need_dhead) {
  const int64_t tokens = check_linear_head(hidden_any, lm_head_any, targets);
  const Tensor hidden = as_contiguous(hidden_any), lm_head = as_contiguous(lm_head_any);
  const PolicyOptions options{parse_objective(objective), 1.0 - clip_low, 1.0 + clip_high, kl_coef, entropy_coef};
  FORGE_CHECK(cu_seqlens.has_value() == (options.objective == Objective::kSequenceClip), "cu_seqlens",
              (cu_seqlens ? "offsets" : "none"), "offsets with objective sequence_clip, none with the others");
  FORGE_CHECK(kl_coef == 0 || ref_logprobs, "ref_logprobs", "none", "float32 [tokens] because kl_coef is not 0");
  const CountedRows counted = count_rows(targets, token_weights, lm_head.size(0), ignore_index, counted_rows);
  const Tensor offsets = cu_seqlens ? as_contiguous(*cu_seqlens) : targets;
  const int64_t documents = cu_seqlens ? check_cu_seqlens(offsets, tokens) : 0;

  const size_t count = counted.count();
  const auto optional_rows = [&](const std::optional<Tensor>& x, const char* argument) {
    return x ? gather_finite(*x, argument, tokens, counted) : std::vector<float>{};
  };
  PolicyRows rows{counted,
                  options,
                  inverse_normalizer(normalizer, counted),
                  gather_finite(advantages, "advantages", tokens, counted),
                  optional_rows(old_logprobs, "old_logprobs"),
                  optional_rows(ref_logprobs, "ref_logprobs"),
                  std::vector<double>(count),
                  std::vector<float>(count),
                  std::vector<float>(count),
                  std::vector<float>(count),
                  std::vector<float>(count),
                  std::vector<float>(count),
                  std::vector<PolicyTerm>(count)};
  std::tuple<Tensor, Tensor> gradients{hidden, lm_head};
  dispatch_float_bf16(hidden, "hidden", [&]<class T>() {
    gradients = run<T>(hidden, lm_head, offsets, documents, rows, static_cast<float>(softcap),
                       static_cast<float>(temperature), need_dhidden, need_dhead);
  });
  Tensor loss = new_tensor({}, ScalarType::Float);
  Tensor counts = new_zeros({3}, ScalarType::Long), sums = new_tensor({5}, ScalarType::Float);
  const double loss_sum = report(rows, mutable_data<int64_t>(counts), mutable_data<float>(sums));
  *mutable_data<float>(loss) = static_cast<float>(loss_sum * rows.inverse);
  return {loss, counts, sums, std::get<0>(gradients), std::get<1>(gradients)};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("policy_gradient_loss", TORCH_BOX(&policy_gradient_loss)); }

}  // namespace
}  // namespace forge

#endif
