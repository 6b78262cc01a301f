// The work of gradient_norm.cu on the CPU, for tests.
#include "cuda/blocks_cpu.h"

#include "cuda/gradient_norm.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("gradient_norm_by_blocks", TORCH_BOX(&gradient_norm)); }

}  // namespace
}  // namespace forge
