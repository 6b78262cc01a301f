// The schema of every torch op of forge_core, once. Implementations: csrc/cpu/<op>.cpp and csrc/cuda/<op>.cu;
// shapes, dtypes and meaning: the docstring of kernels/<op>.py.
#include <torch/csrc/stable/library.h>

#include <string>

STABLE_TORCH_LIBRARY(forge, m) {
  m.def("empty_cache() -> int");
  m.def("scaled(Tensor x, Tensor factor) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, float weight_offset) -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd, float weight_offset, bool need_dweight)"
      " -> (Tensor dx, Tensor dweight)");
  m.def("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool inverse) -> (Tensor q, Tensor k)");
  m.def("swiglu(Tensor gate, Tensor up, str activation) -> Tensor");
  m.def("swiglu_backward(Tensor dy, Tensor gate, Tensor up, str activation) -> (Tensor dgate, Tensor dup)");
  m.def(
      "lora_shrink(Tensor x, Tensor[] lora_a, float[] scaling, float dropout_p, Tensor? dropout_seed) -> Tensor");
  m.def(
      "lora_shrink_backward(Tensor ds, Tensor x, int[] ranks, bool[] wide, float dropout_p, Tensor? dropout_seed)"
      " -> Tensor[]");
  m.def(
      "lora_matmul(Tensor x, Tensor s, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] biases,"
      " float[] scaling, float dropout_p, Tensor? dropout_seed) -> Tensor[]");
  m.def(
      "lora_matmul_backward(Tensor[] dys, Tensor s, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b,"
      " float[] scaling, float dropout_p, Tensor? dropout_seed, bool need_dx, bool need_db)"
      " -> (Tensor dx, Tensor ds, Tensor[] dbs)");
  m.def("frozen_linear(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]");
  m.def("frozen_linear_backward(Tensor[] dys, Tensor[] weights) -> Tensor");
  m.def("linear_argmax(Tensor hidden, Tensor lm_head) -> Tensor");
  m.def(
      "weighted_linear_cross_entropy(Tensor hidden, Tensor lm_head, Tensor targets, Tensor? token_weights,"
      " Tensor? source_ids, int num_sources, Tensor? normalizer, int ignore_index, SymInt? counted_rows,"
      " float softcap, float z_loss, float label_smoothing, bool need_dhidden, bool need_dhead)"
      " -> (Tensor loss, Tensor weighted_nll, Tensor weight_sum, Tensor token_count, Tensor correct, Tensor dhidden,"
      " Tensor dhead)");
  // A step of weighted_linear_cross_entropy on a GPU; the implementation on the CPU is for tests.
  m.def(
      "cross_entropy_rows(Tensor(a!) logits, Tensor(a!)? dlogits, Tensor rows, Tensor count, Tensor targets,"
      " Tensor? token_weights, Tensor? source_ids, Tensor inverse, Tensor(b!) sums, int first, int cluster,"
      " float softcap, float z_loss, float label_smoothing) -> ()");
  m.def(
      "token_logprob_rows(Tensor(a!) logits, Tensor(a!)? dlogits, Tensor rows, Tensor count, Tensor targets,"
      " Tensor(b!)? logprob, Tensor(c!)? entropy, Tensor(d!)? log_ratio, Tensor? dlogprob, Tensor? dentropy,"
      " Tensor? advantages, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? token_weights, Tensor? inverse,"
      " int objective, float lower, float upper, float kl_coef, float entropy_coef, float softcap, float temperature,"
      " int first, int cluster, int clusters) -> ()");
  m.def(
      "linear_token_logprobs(Tensor hidden, Tensor lm_head, Tensor targets, float temperature, float softcap,"
      " int ignore_index, SymInt? counted_rows) -> (Tensor logprob, Tensor entropy, Tensor softmax)");
  m.def(
      "linear_token_logprobs_backward(Tensor dlogprob, Tensor dentropy, Tensor hidden, Tensor lm_head, Tensor targets,"
      " Tensor entropy, Tensor softmax, float temperature, float softcap, int ignore_index,"
      " SymInt? counted_rows, bool need_dhidden, bool need_dhead) -> (Tensor dhidden, Tensor dhead)");
  m.def(
      "policy_gradient_loss(Tensor hidden, Tensor lm_head, Tensor targets, Tensor advantages, Tensor? old_logprobs,"
      " Tensor? ref_logprobs, Tensor? token_weights, Tensor? cu_seqlens, Tensor? normalizer, str objective,"
      " float clip_low, float clip_high, float kl_coef, float entropy_coef, float temperature, float softcap,"
      " int ignore_index, SymInt? counted_rows, bool need_dhidden, bool need_dhead)"
      " -> (Tensor loss, Tensor counts, Tensor sums, Tensor dhidden, Tensor dhead)");
  m.def(
      "packed_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor? tiles, bool causal, int window,"
      " float softcap, float scale, Tensor? parents=None) -> (Tensor out, Tensor lse)");
  m.def(
      "packed_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor cu_seqlens,"
      " bool causal, int window, float softcap, float scale, Tensor? parents=None)"
      " -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def(
      "decode_attention(Tensor q, Tensor keys, Tensor values, Tensor lengths, int window, float softcap, float scale)"
      " -> Tensor");
  m.def(
      "decode_layers(Tensor x, Tensor positions, Tensor[] tables, Tensor(a!)[] keys, Tensor(b!)[] values,"
      " Tensor[] tensors, int[] slots, int[] windows, int[] table_of_layer, int q_heads, str activation, float eps,"
      " float weight_offset, float scale, float softcap) -> Tensor");
  // The second name of each is the GPU's work, thread by thread on the CPU, for tests.
  for (const char* name : {"gradient_norm", "gradient_norm_by_blocks"}) {
    m.def((std::string(name) + "(Tensor[] gradients) -> Tensor").c_str());
  }
  for (const char* name : {"adamw_", "adamw_by_blocks_"}) {
    m.def((std::string(name) +
           "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq,"
           " Tensor(d!) steps, Tensor(e!)[] rounded, Tensor lr_scales, Tensor weight_decays, float learning_rate,"
           " Tensor? learning_rate_tensor, float beta1, float beta2, float eps, Tensor? norm, float max_norm) -> ()")
              .c_str());
  }
  m.def("has_bf16_dot_product() -> bool");
}
