// The arithmetic of cross_entropy_rows.cu on the CPU, for tests.
#include "cuda/logit_rows_cpu.h"

#include "cuda/cross_entropy_rows.h"

namespace forge {
namespace {

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("cross_entropy_rows", TORCH_BOX(&cross_entropy_rows)); }

}  // namespace
}  // namespace forge
