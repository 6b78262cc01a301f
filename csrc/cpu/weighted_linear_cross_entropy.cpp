// weighted_linear_cross_entropy: loss, statistics per source and both gradients in one pass. The weights and their sum
// are known before the loss, so dlogits follow logits at once and the backward of autograd only scales. Over a frozen
// bfloat16 head the logits are never in memory (streamed_rows.h); otherwise they come in chunks of rows, and a row's
// dlogits are written over its logits while they are in the second-level cache.
#include "cpu/softmax_row.h"

namespace forge {

struct CrossEntropyOptions {
  float softcap;  // 0: none
  float z_loss;
  float label_smoothing;
  bool gradient;  // overwrite the logits by dlogits
};

template <class T>
struct CrossEntropyKernels {
  // Rows [begin, end) of z [rows, stride]: nll, token loss (with smoothing and z-loss) and whether the target is the
  // first maximum; dlogits = scale[row] * d(token loss)/dz as T over the row of z.
  void (*rows)(float* z, int64_t stride, int64_t vocab, const int64_t* target, const float* scale, float* nll,
               float* token_loss, bool* correct, const CrossEntropyOptions& options, int64_t begin, int64_t end);
};

namespace FORGE_ISA {
namespace {

template <class T>
void rows(float* z_rows, int64_t stride, int64_t vocab, const int64_t* target, const float* scale, float* nll,
          float* token_loss, bool* correct, const CrossEntropyOptions& options, int64_t begin, int64_t end) {
  const FlushDenormals flush_denormals;
  const float softcap = options.softcap, smoothing = options.label_smoothing;
  for (int64_t row = begin; row < end; ++row) {
    float* z = z_rows + row * stride;
    const RowSums sums = sum_row(z, vocab, softcap, 1.0f);
    const double max = static_cast<double>(sums.max), log_sum = __builtin_log(sums.exp_sum);
    const float z_target = z[target[row]];
    const double log_z = max + log_sum, row_nll = log_sum + (max - static_cast<double>(z_target));
    const double uniform = log_z - sums.sum / static_cast<double>(vocab);
    nll[row] = static_cast<float>(row_nll);
    token_loss[row] = static_cast<float>(row_nll + static_cast<double>(smoothing) * (uniform - row_nll) +
                                         static_cast<double>(options.z_loss) * log_z * log_z);
    correct[row] = is_first_max(z, target[row], sums.max);
    if (!options.gradient) continue;

    // d(token loss)/dz = p * (1 + 2 * z_loss * Z) - smoothing / vocab - (1 - smoothing) * onehot
    const float s = scale[row], row_max = sums.max;
    const float factor = static_cast<float>(static_cast<double>(s) *
                                            (1.0 + 2.0 * static_cast<double>(options.z_loss) * log_z) / sums.exp_sum);
    const float constant = -s * smoothing / static_cast<float>(vocab);
    float at_target = factor * exp_nonpositive(z_target - row_max) + constant - s * (1.0f - smoothing);
    if (softcap > 0) {
      const float inverse = 1.0f / softcap, slope = z_target * inverse;
      at_target *= 1.0f - slope * slope;
      rewrite_row<T>(z, vocab, target[row], 0.0f, 1.0f, [=](float value) {
        const float tanh = value * inverse;
        return (factor * exp_nonpositive(value - row_max) + constant) * (1.0f - tanh * tanh);
      });
    } else {
      rewrite_row<T>(z, vocab, target[row], 0.0f, 1.0f, [=](float value) {
        return factor * exp_nonpositive(value - row_max) + constant;
      });
    }
    reinterpret_cast<T*>(z)[target[row]] = from_float<T>(at_target);
  }
}

const RegisterKernels<CrossEntropyKernels<float>> register_float({&rows<float>});
const RegisterKernels<CrossEntropyKernels<bf16>> register_bf16({&rows<bf16>});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include "cpu/counted_rows.h"
#include "cpu/linear_head.h"
#include "cpu/streamed_rows.h"

namespace forge {
namespace {

// The source of every row that counts; no source_ids: source 0.
std::vector<int32_t> sources_of(const CountedRows& counted, const std::optional<Tensor>& source_ids, int64_t tokens,
                                int64_t num_sources) {
  std::vector<int32_t> sources(counted.count());
  if (!source_ids) return sources;
  check_vector(*source_ids, "source_ids", ScalarType::Int, tokens);
  const Tensor ids = as_contiguous(*source_ids);
  for (size_t i = 0; i < sources.size(); ++i) {
    sources[i] = data<int32_t>(ids)[counted.rows[i]];
    FORGE_CHECK(sources[i] >= 0 && sources[i] < num_sources, "source_ids", sources[i] << " in row " << counted.rows[i],
                "0 <= id < " << num_sources);
  }
  return sources;
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs weighted_linear_cross_entropy(const Tensor& hidden_any, const Tensor& lm_head_any, const Tensor& targets,
                                      std::optional<Tensor> token_weights, std::optional<Tensor> source_ids,
                                      int64_t num_sources, std::optional<Tensor> normalizer, int64_t ignore_index,
                                      std::optional<int64_t> counted_rows, double softcap, double z_loss,
                                      double label_smoothing, bool need_dhidden, bool need_dhead) {
  const int64_t tokens = check_linear_head(hidden_any, lm_head_any, targets);
  FORGE_CHECK(num_sources >= 1, "num_sources", num_sources, "at least 1");
  const Tensor hidden = as_contiguous(hidden_any), lm_head = as_contiguous(lm_head_any);
  const int64_t vocab = lm_head.size(0);
  const CountedRows counted = count_rows(targets, token_weights, vocab, ignore_index, counted_rows);
  const std::vector<int32_t> sources = sources_of(counted, source_ids, tokens, num_sources);
  const double inverse = inverse_normalizer(normalizer, counted);

  const size_t count = counted.count();
  std::vector<float> scale(count), nll(count), token_loss(count);
  const Tensor correct_rows = new_tensor({static_cast<int64_t>(count)}, ScalarType::Bool);
  bool* correct = mutable_data<bool>(correct_rows);
  for (size_t i = 0; i < count; ++i) scale[i] = static_cast<float>(static_cast<double>(counted.weights[i]) * inverse);

  const CrossEntropyOptions options{static_cast<float>(softcap), static_cast<float>(z_loss),
                                    static_cast<float>(label_smoothing), need_dhidden || need_dhead};
  Tensor dhidden = hidden, dhead = lm_head;
  if (head_can_stream(hidden) && !need_dhead && label_smoothing == 0) {
    dhidden = stream_rows(hidden, lm_head, counted.rows, counted.targets, options.softcap, 1.0f, need_dhidden,
                          [&](int64_t i, const StreamedRow& row) {
                            const double log_z = z_loss == 0 ? 0.0 : row.max + std::log(row.exp_sum);
                            nll[i] = static_cast<float>(-row.logprob);
                            token_loss[i] = static_cast<float>(-row.logprob + z_loss * log_z * log_z);
                            correct[i] = row.correct;
                            const double weight = static_cast<double>(scale[i]);
                            return StreamedGradient{weight * (1.0 + 2.0 * z_loss * log_z), -weight};
                          });
    dhead = new_tensor({0}, hidden.scalar_type());
  } else {
    dispatch_float_bf16(hidden, "hidden", [&]<class T>() {
      LinearHeadChunks<T> chunks(hidden, lm_head, counted.rows, need_dhidden, need_dhead);
      for (int64_t chunk = 0; chunk < chunks.chunks(); ++chunk) {
        float* z = chunks.logits(chunk);
        const int64_t first = chunks.first(chunk);
        torch::stable::parallel_for(0, chunks.size(chunk), 1, [&](int64_t begin, int64_t end) {
          kernels<CrossEntropyKernels<T>>().rows(z, chunks.stride(), vocab, counted.targets.data() + first,
                                                 scale.data() + first, nll.data() + first, token_loss.data() + first,
                                                 correct + first, options, begin, end);
        });
        if (options.gradient) chunks.backward(chunk);
      }
      dhidden = chunks.dhidden();
      dhead = chunks.dhead();
    });
  }

  // Row by row in double: the result depends neither on the chunks nor on the number of threads.
  std::vector<double> nll_sum(num_sources), weight_sum(num_sources);
  Tensor token_count = new_zeros({num_sources}, ScalarType::Long);
  Tensor correct_count = new_zeros({num_sources}, ScalarType::Long);
  double loss_sum = 0;
  for (size_t i = 0; i < count; ++i) {
    const int32_t source = sources[i];
    const double weight = static_cast<double>(counted.weights[i]);
    loss_sum += weight * static_cast<double>(token_loss[i]);
    nll_sum[source] += weight * static_cast<double>(nll[i]);
    weight_sum[source] += weight;
    mutable_data<int64_t>(token_count)[source] += 1;
    mutable_data<int64_t>(correct_count)[source] += correct[i] ? 1 : 0;
  }
  Tensor loss = new_tensor({}, ScalarType::Float);
  *mutable_data<float>(loss) = static_cast<float>(loss_sum * inverse);
  Tensor source_nll = new_tensor({num_sources}, ScalarType::Float);
  Tensor source_weight = new_tensor({num_sources}, ScalarType::Float);
  for (int64_t s = 0; s < num_sources; ++s) {
    mutable_data<float>(source_nll)[s] = static_cast<float>(nll_sum[s]);
    mutable_data<float>(source_weight)[s] = static_cast<float>(weight_sum[s]);
  }
  return {loss, source_nll, source_weight, token_count, correct_count, dhidden, dhead};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("weighted_linear_cross_entropy", TORCH_BOX(&weighted_linear_cross_entropy));
}

}  // namespace
}  // namespace forge

#endif
