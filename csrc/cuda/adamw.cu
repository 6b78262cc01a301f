#include "cuda/blocks.cuh"

#include "cuda/adamw.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CUDA, m) { m.impl("adamw_", TORCH_BOX(&adamw_<&update>)); }

}  // namespace
}  // namespace forge
