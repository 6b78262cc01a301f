// The arithmetic of token_logprob_rows.cu on the CPU, for tests.
#include "cuda/logit_rows_cpu.h"

#include "cuda/token_logprob_rows.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("token_logprob_rows", TORCH_BOX(&token_logprob_rows)); }

}  // namespace
}  // namespace forge
