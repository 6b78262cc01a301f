// Rows of logits to log-probabilities of their targets, and gradients of those back to logits. The loops are in
// linear_token_logprobs.cpp; policy_gradient_loss runs them too.
#pragma once

#include "cpu/vec.h"

namespace forge {

// A chunk of logits and what is known of each of its rows.
struct TokenLogprobRows {
  float* z;  // [rows, stride]
  int64_t stride, vocab;
  const int64_t* target;
  float softcap, temperature;  // y = softcap * tanh(z / softcap) / temperature; softcap 0: y = z / temperature
  double* logprob;             // of softmax(y); float would lose what a difference of two of them needs
  float* entropy;
  // Maximum of y and sum(e^(y - max)): the log of the sum, rounded to float, would scale all probabilities of the row.
  float *max, *exp_sum;
};

template <class T>
struct TokenLogprobKernels {
  // Rows [begin, end): z becomes y; fills logprob, entropy, max and exp_sum.
  void (*forward)(const TokenLogprobRows& rows, int64_t begin, int64_t end);
  // Rows [begin, end): dz as T over the row of z, from the gradients of logprob and entropy. `scaled`: z holds y.
  void (*backward)(const TokenLogprobRows& rows, const float* dlogprob, const float* dentropy, bool scaled,
                   int64_t begin, int64_t end);
};

}  // namespace forge
