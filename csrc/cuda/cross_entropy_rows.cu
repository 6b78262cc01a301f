#include "cuda/logit_rows.cuh"

#include "cuda/cross_entropy_rows.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CUDA, m) { m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows)); }

}  // namespace
}  // namespace forge
