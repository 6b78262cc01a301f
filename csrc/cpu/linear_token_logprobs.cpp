// linear_token_logprobs: log-probability and entropy per token. The backward takes any upstream gradients and computes
// the logits of each chunk again: four matmuls in all, and no tokens x vocab matrix.
#include "cpu/softmax_row.h"

namespace forge {

template <class T>
struct TokenLogprobKernels {
  // Rows [begin, end) of z [rows, stride] -> logprob of the target, entropy, and the maximum and log(sum(e^(y - max)))
  // of the scaled logits y. The two are kept apart: their sum would lose what makes p = 1 exact.
  void (*forward)(float* z, int64_t stride, int64_t vocab, const int64_t* target, float softcap, float temperature,
                  float* logprob, float* entropy, float* max, float* log_sum, int64_t begin, int64_t end);
  // Rows [begin, end): dlogits as T over the row of z.
  void (*backward)(float* z, int64_t stride, int64_t vocab, const int64_t* target, float softcap, float temperature,
                   const float* dlogprob, const float* dentropy, const float* entropy, const float* max,
                   const float* log_sum, int64_t begin, int64_t end);
};

namespace FORGE_ISA {
namespace {

template <class T>
void forward(float* z_rows, int64_t stride, int64_t vocab, const int64_t* target, float softcap, float temperature,
             float* logprob, float* entropy, float* max, float* log_sum, int64_t begin, int64_t end) {
  const FlushDenormals flush_denormals;
  for (int64_t row = begin; row < end; ++row) {
    float* z = z_rows + row * stride;
    const RowSums sums = sum_row(z, vocab, softcap, 1.0f / temperature);
    const double log_exp_sum = __builtin_log(sums.exp_sum);
    const double shifted = static_cast<double>(z[target[row]]) - static_cast<double>(sums.max);
    logprob[row] = static_cast<float>(shifted - log_exp_sum);
    entropy[row] = static_cast<float>(log_exp_sum - sums.exp_shift_sum / sums.exp_sum);
    max[row] = sums.max;
    log_sum[row] = static_cast<float>(log_exp_sum);
  }
}

// With y = softcapped z / temperature, p = softmax(y), H the entropy:
//   d logprob / dy = onehot - p,   dH / dy = -p * (log p + H)
template <class T>
void backward(float* z_rows, int64_t stride, int64_t vocab, const int64_t* target, float softcap, float temperature,
              const float* dlogprob, const float* dentropy, const float* entropy, const float* max,
              const float* log_sum, int64_t begin, int64_t end) {
  const FlushDenormals flush_denormals;
  const float inverse = 1.0f / temperature;
  for (int64_t row = begin; row < end; ++row) {
    float* z = z_rows + row * stride;
    const float g = dlogprob[row] * inverse, h = dentropy[row] * inverse;
    const float constant = g + h * entropy[row], row_max = max[row], row_log_sum = log_sum[row];
    const auto at_logits = [=](float y) {
      const float logp = (y - row_max) - row_log_sum;
      return -exp_approx(logp) * (constant + h * logp);
    };
    float y_target, slope = 1.0f;
    if (softcap > 0) {
      const float to_tanh = temperature / softcap;
      y_target = rewrite_row<T>(z, vocab, target[row], softcap, inverse, [=](float y) {
        const float tanh = y * to_tanh;
        return at_logits(y) * (1.0f - tanh * tanh);
      });
      slope = 1.0f - (y_target * to_tanh) * (y_target * to_tanh);
    } else {
      y_target = rewrite_row<T>(z, vocab, target[row], softcap, inverse, at_logits);
    }
    reinterpret_cast<T*>(z)[target[row]] = from_float<T>((g + at_logits(y_target)) * slope);
  }
}

const RegisterKernels<TokenLogprobKernels<float>> register_float({&forward<float>, &backward<float>});
const RegisterKernels<TokenLogprobKernels<bf16>> register_bf16({&forward<bf16>, &backward<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/linear_head.h"

namespace forge {
namespace {

struct Kept {
  std::vector<int64_t> rows, targets;
};

Kept keep_rows(const Tensor& targets_any, int64_t vocab, int64_t ignore_index) {
  const Tensor targets = as_contiguous(targets_any);
  Kept kept;
  for (int64_t i = 0; i < targets.numel(); ++i) {
    const int64_t target = data<int64_t>(targets)[i];
    if (target == ignore_index) continue;
    check_target(target, i, vocab);
    kept.rows.push_back(i);
    kept.targets.push_back(target);
  }
  return kept;
}

std::tuple<Tensor, Tensor, Tensor> linear_token_logprobs(const Tensor& hidden_any, const Tensor& lm_head_any,
                                                         const Tensor& targets, double temperature, double softcap,
                                                         int64_t ignore_index) {
  const int64_t tokens = check_linear_head(hidden_any, lm_head_any, targets);
  const Tensor hidden = as_contiguous(hidden_any), lm_head = as_contiguous(lm_head_any);
  const int64_t vocab = lm_head.size(0);
  const Kept kept = keep_rows(targets, vocab, ignore_index);
  const size_t count = kept.rows.size();
  std::vector<float> compact(4 * count);  // logprob, entropy, max, log_sum of the kept rows
  dispatch_float_bf16(hidden, "hidden", [&]<class T>() {
    LinearHeadChunks<T> chunks(hidden, lm_head, kept.rows, false, false);
    for (int64_t chunk = 0; chunk < chunks.chunks(); ++chunk) {
      float* z = chunks.logits(chunk);
      const int64_t first = chunks.first(chunk);
      float* values = compact.data() + first;
      torch::stable::parallel_for(0, chunks.size(chunk), 1, [&](int64_t begin, int64_t end) {
        kernels<TokenLogprobKernels<T>>().forward(z, chunks.stride(), vocab, kept.targets.data() + first,
                                                  static_cast<float>(softcap), static_cast<float>(temperature), values,
                                                  values + count, values + 2 * count, values + 3 * count, begin, end);
      });
    }
  });
  const Tensor logprob = new_zeros({tokens}, ScalarType::Float), entropy = new_zeros({tokens}, ScalarType::Float);
  const Tensor softmax = new_zeros({2, tokens}, ScalarType::Float);
  for (size_t i = 0; i < count; ++i) {
    const int64_t row = kept.rows[i];
    mutable_data<float>(logprob)[row] = compact[i];
    mutable_data<float>(entropy)[row] = compact[count + i];
    mutable_data<float>(softmax)[row] = compact[2 * count + i];
    mutable_data<float>(softmax)[tokens + row] = compact[3 * count + i];
  }
  return {logprob, entropy, softmax};
}

std::tuple<Tensor, Tensor> linear_token_logprobs_backward(const Tensor& dlogprob, const Tensor& dentropy,
                                                          const Tensor& hidden_any, const Tensor& lm_head_any,
                                                          const Tensor& targets, const Tensor& entropy,
                                                          const Tensor& softmax, double temperature, double softcap,
                                                          int64_t ignore_index, bool need_dhidden, bool need_dhead) {
  const int64_t tokens = check_linear_head(hidden_any, lm_head_any, targets);
  const Tensor hidden = as_contiguous(hidden_any), lm_head = as_contiguous(lm_head_any);
  const int64_t vocab = lm_head.size(0);
  const Kept kept = keep_rows(targets, vocab, ignore_index);
  const size_t count = kept.rows.size();
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
      float* z = chunks.logits(chunk);
      const int64_t first = chunks.first(chunk);
      const float* values = compact.data() + first;
      torch::stable::parallel_for(0, chunks.size(chunk), 1, [&](int64_t begin, int64_t end) {
        kernels<TokenLogprobKernels<T>>().backward(z, chunks.stride(), vocab, kept.targets.data() + first,
                                                   static_cast<float>(softcap), static_cast<float>(temperature), values,
                                                   values + count, values + 2 * count, values + 3 * count,
                                                   values + 4 * count, begin, end);
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
