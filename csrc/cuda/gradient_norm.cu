#include "cuda/blocks.cuh"

#include "cuda/gradient_norm.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CUDA, m) { m.impl("gradient_norm", TORCH_BOX(&gradient_norm)); }

}  // namespace
}  // namespace forge
