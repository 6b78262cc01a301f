// The work of adamw.cu on the CPU, for tests.
#include "cuda/blocks_cpu.h"

#include "cuda/adamw.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("adamw_by_blocks_", TORCH_BOX(&adamw_<&update>)); }

}  // namespace
}  // namespace forge
