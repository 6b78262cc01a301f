// linear_token_logprobs: log-probability and entropy per token. The backward takes any upstream gradients and computes
// the logits of each chunk again: four matmuls in all, and no tokens x vocab matrix.
#include "cpu/softmax_row.h"
#include "cpu/token_logprobs.h"

namespace forge {
namespace FORGE_ISA {
namespace {

template <class T>
void forward(const TokenLogprobRows& rows, int64_t begin, int64_t end) {
  const FlushDenormals flush_denormals;
  for (int64_t row = begin; row < end; ++row) {
    float* z = rows.z + row * rows.stride;
    const RowSums sums = sum_row(z, rows.vocab, rows.softcap, 1.0f / rows.temperature);
    const double log_exp_sum = __builtin_log(sums.exp_sum);
    const double shifted = static_cast<double>(z[rows.target[row]]) - static_cast<double>(sums.max);
    rows.logprob[row] = shifted - log_exp_sum;
    rows.entropy[row] = static_cast<float>(log_exp_sum - sums.exp_shift_sum / sums.exp_sum);
    rows.max[row] = sums.max;
    rows.exp_sum[row] = static_cast<float>(sums.exp_sum);
  }
}

// With y = softcapped z / temperature, p = softmax(y), H the entropy:
//   d logprob / dy = onehot - p,   dH / dy = -p * (log p + H)
template <class T>
void backward(const TokenLogprobRows& rows, const float* dlogprob, const float* dentropy, bool scaled, int64_t begin,
              int64_t end) {
  const FlushDenormals flush_denormals;
  const float inverse = 1.0f / rows.temperature;
  const float cap = scaled ? 0.0f : rows.softcap, scale = scaled ? 1.0f : inverse;  // what is left to do to z
  for (int64_t row = begin; row < end; ++row) {
    float* z = rows.z + row * rows.stride;
    const int64_t target = rows.target[row];
    const float g = dlogprob[row] * inverse, h = dentropy[row] * inverse;
    const float row_max = rows.max[row], inverse_sum = 1.0f / rows.exp_sum[row];
    const float log_sum = static_cast<float>(__builtin_log(static_cast<double>(rows.exp_sum[row])));
    const float constant = g + h * rows.entropy[row];
    const auto at_logits = [=](float y) {
      const float shifted = y - row_max;
      return -(exp_nonpositive(shifted) * inverse_sum) * (constant + h * (shifted - log_sum));
    };
    float y_target, slope = 1.0f;
    if (rows.softcap > 0) {
      const float to_tanh = rows.temperature / rows.softcap;
      y_target = rewrite_row<T>(z, rows.vocab, target, cap, scale, [=](float y) {
        const float tanh = y * to_tanh;
        return at_logits(y) * (1.0f - tanh * tanh);
      });
      slope = 1.0f - (y_target * to_tanh) * (y_target * to_tanh);
    } else {
      y_target = rewrite_row<T>(z, rows.vocab, target, cap, scale, at_logits);
    }
    reinterpret_cast<T*>(z)[target] = from_float<T>((g + at_logits(y_target)) * slope);
  }
}

const RegisterKernels<TokenLogprobKernels<float>> register_float({&forward<float>, &backward<float>});
const RegisterKernels<TokenLogprobKernels<bf16>> register_bf16({&forward<bf16>, &backward<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/counted_rows.h"
#include "cpu/linear_head.h"
#include "cpu/streamed_rows.h"

namespace forge {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs(const Tensor& hidden_any, const Tensor& lm_head_any,
                                                         const Tensor& targets, double temperature, double softcap,
                                                         int64_t ignore_index, std::optional<int64_t> counted_rows) {
  const int64_t tokens = check_linear_head(hidden_any, lm_head_any, targets);
  const Tensor hidden = as_contiguous(hidden_any), lm_head = as_contiguous(lm_head_any);
  const int64_t vocab = lm_head.size(0);
  const CountedRows kept = count_rows(targets, {}, vocab, ignore_index, counted_rows);
  const size_t count = kept.count();
  std::vector<double> logprobs(count);
  std::vector<float> compact(3 * count);  // entropy, max, exp_sum of the kept rows
  dispatch_float_bf16(hidden, "hidden", [&]<class T>() {
    if (head_can_stream(hidden)) {
      stream_rows(hidden, lm_head, kept.rows, kept.targets, static_cast<float>(softcap),
                  static_cast<float>(temperature), false, [&](int64_t row, const StreamedRow& softmax) {
                    const size_t i = static_cast<size_t>(row);
                    logprobs[i] = softmax.logprob;
                    compact[i] = static_cast<float>(softmax.entropy);
                    compact[count + i] = static_cast<float>(softmax.max);
                    compact[2 * count + i] = static_cast<float>(softmax.exp_sum);
                    return StreamedGradient{};
                  });
      return;
    }
    LinearHeadChunks<T> chunks(hidden, lm_head, kept.rows, false, false);
    for (int64_t chunk = 0; chunk < chunks.chunks(); ++chunk) {
      const int64_t first = chunks.first(chunk);
      float* values = compact.data() + first;
      const TokenLogprobRows rows{chunks.logits(chunk), chunks.stride(), vocab, kept.targets.data() + first,
                                  static_cast<float>(softcap), static_cast<float>(temperature),
                                  logprobs.data() + first, values, values + count, values + 2 * count};
      torch::stable::parallel_for(0, chunks.size(chunk), 1, [&](int64_t begin, int64_t end) {
        kernels<TokenLogprobKernels<T>>().forward(rows, begin, end);
      });
    }
  });
  const Tensor logprob = new_zeros({tokens}, ScalarType::Float), entropy = new_zeros({tokens}, ScalarType::Float);
  const Tensor softmax = new_zeros({2, tokens}, ScalarType::Float);
  for (size_t i = 0; i < count; ++i) {
    const int64_t row = kept.rows[i];
    mutable_data<float>(logprob)[row] = static_cast<float>(logprobs[i]);
    mutable_data<float>(entropy)[row] = compact[i];
    mutable_data<float>(softmax)[row] = compact[count + i];
    mutable_data<float>(softmax)[tokens + row] = compact[2 * count + i];
  }
  return {logprob, entropy, softmax};
}

std::tuple<Tensor, Tensor> linear_token_logprobs_backward(const Tensor& dlogprob, const Tensor& dentropy,
                                                          const Tensor& hidden_any, const Tensor& lm_head_any,
                                                          const Tensor& targets, const Tensor& entropy,
                                                          const Tensor& softmax, double temperature, double softcap,
                                                          int64_t ignore_index, std::optional<int64_t> counted_rows,
                                                          bool need_dhidden, bool need_dhead) {
  const int64_t tokens = check_linear_head(hidden_any, lm_head_any, targets);
  const Tensor hidden = as_contiguous(hidden_any), lm_head = as_contiguous(lm_head_any);
  const int64_t vocab = lm_head.size(0);
  const CountedRows kept = count_rows(targets, {}, vocab, ignore_index, counted_rows);
  const size_t count = kept.count();
  std::vector<float> compact(5 * count);
  const auto gather = [&](const Tensor& any, const char* argument, size_t k) {
    check_vector(any, argument, ScalarType::Float, tokens);
    const Tensor values = as_contiguous(any);
    for (size_t i = 0; i < count; ++i) compact[k * count + i] = data<float>(values)[kept.rows[i]];
  };
  gather(dlogprob, "dlogprob", 0);
  gather(dentropy, "dentropy", 1);
  gather(entropy, "entropy", 2);
  FORGE_CHECK(softmax.dim() == 2 && softmax.size(0) == 2, "softmax", "other shape", "[2, " << tokens << "]");
  Tensor rows_of_softmax = softmax;
  gather(torch::stable::select(rows_of_softmax, 0, 0), "softmax", 3);
  gather(torch::stable::select(rows_of_softmax, 0, 1), "softmax", 4);

  Tensor dhidden = hidden, dhead = lm_head;
  dispatch_float_bf16(hidden, "hidden", [&]<class T>() {
    LinearHeadChunks<T> chunks(hidden, lm_head, kept.rows, need_dhidden, need_dhead);
    for (int64_t chunk = 0; chunk < chunks.chunks() && (need_dhidden || need_dhead); ++chunk) {
      const int64_t first = chunks.first(chunk);
      float* values = compact.data() + first;
      // The log-probabilities themselves are not needed; nothing writes the rest.
      const TokenLogprobRows rows{chunks.logits(chunk), chunks.stride(), vocab, kept.targets.data() + first,
                                  static_cast<float>(softcap), static_cast<float>(temperature), nullptr,
                                  values + 2 * count, values + 3 * count, values + 4 * count};
      torch::stable::parallel_for(0, chunks.size(chunk), 1, [&](int64_t begin, int64_t end) {
        kernels<TokenLogprobKernels<T>>().backward(rows, values, values + count, false, begin, end);
      });
      chunks.backward(chunk);
    }
    dhidden = chunks.dhidden();
    dhead = chunks.dhead();
  });
  return {dhidden, dhead};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("linear_token_logprobs", TORCH_BOX(&linear_token_logprobs));
  m.impl("linear_token_logprobs_backward", TORCH_BOX(&linear_token_logprobs_backward));
}

}  // namespace
}  // namespace forge

#endif
