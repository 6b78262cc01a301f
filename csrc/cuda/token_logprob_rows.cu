#include "cuda/logit_rows.cuh"

#include "cuda/token_logprob_rows.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CUDA, m) { m.impl("token_logprob_rows", TORCH_BOX(&token_logprob_rows)); }

}  // namespace
}  // namespace forge
