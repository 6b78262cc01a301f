// matmul_nt: float32 C = bfloat16 A times transposed bfloat16 B, with the AVX512-BF16 dot product.
#include "cpu/matmul_nt.h"

#include "cpu/avx512_bf16/block.h"

namespace forge {
namespace FORGE_ISA {
namespace {

void panels(const bf16* a, int64_t lda, const bf16* b, float* c, int64_t ldc, int64_t rows, int64_t n, int64_t k,
            int64_t begin, int64_t end) {
  alignas(64) uint32_t packed[kMaxPairs * kNtColumns];
  const int64_t pairs_per_block = block_pairs(lda / 2);
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t column = panel * kNtColumns;
    const int64_t columns = n - column < kNtColumns ? n - column : kNtColumns;
    for (int64_t first = 0; first < lda / 2 || first == 0; first += pairs_per_block) {
      const int64_t left = lda / 2 - first;
      const int64_t pairs = left < pairs_per_block ? left : pairs_per_block;
      const int64_t depth = k - 2 * first < 2 * pairs ? k - 2 * first : 2 * pairs;
      pack(b + column * k + 2 * first, k, columns, depth, packed);
      for (int64_t row = 0; row < rows; row += kNtRows) {
        block_8x48(a + row * lda + 2 * first, lda, 2, packed, pairs, c + row * ldc + column, ldc, first == 0);
      }
    }
  }
}

const RegisterKernels<MatmulNtKernels> register_kernels({&panels});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge
