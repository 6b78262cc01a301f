// What every loss over a linear head shares: the rows that count, in chunks; their logits in float32; and the gradients
// from the chunk's dlogits. Scratch is one chunk of logits, never tokens x vocab. Included where FORGE_ISA_LEVEL == 0.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/matmul_nt.h"
#include "cpu/tensor.h"

namespace forge {

// Shapes and dtypes that memory safety needs; returns the number of tokens.
inline int64_t check_linear_head(const Tensor& hidden, const Tensor& lm_head, const Tensor& targets) {
  FORGE_CHECK(hidden.dim() == 2, "hidden", hidden.dim() << " dimensions", "[tokens, hidden]");
  FORGE_CHECK(lm_head.dim() == 2 && lm_head.size(1) == hidden.size(1) && lm_head.size(0) > 0, "lm_head",
              "other shape", "[vocab, " << hidden.size(1) << "]");
  FORGE_CHECK(lm_head.scalar_type() == hidden.scalar_type(), "lm_head", toString(lm_head.scalar_type()),
              toString(hidden.scalar_type()));
  FORGE_CHECK(targets.scalar_type() == ScalarType::Long && targets.dim() == 1 && targets.numel() == hidden.size(0),
              "targets", toString(targets.scalar_type()) << " with " << targets.numel() << " elements",
              "int64 [" << hidden.size(0) << "]");
  return hidden.size(0);
}

constexpr int64_t kChunkBytes = int64_t{128} << 20;
constexpr int64_t kMinChunkRows = 128, kMaxChunkRows = 512;  // below, the matmuls slow down; above, nothing is gained

template <class T>
class LinearHeadChunks {
 public:
  LinearHeadChunks(const Tensor& hidden, const Tensor& lm_head, const std::vector<int64_t>& rows, bool need_dhidden,
                   bool need_dhead)
      : hidden_(hidden), lm_head_(lm_head), rows_(rows), vocab_(lm_head.size(0)), width_(hidden.size(1)),
        dtype_(hidden.scalar_type()),
        dhidden_(new_tensor({0}, dtype_)), dhead_(new_tensor({0}, dtype_)), dhead_sum_(new_tensor({0}, dtype_)),
        need_dhidden_(need_dhidden), need_dhead_(need_dhead) {
    const int64_t count = static_cast<int64_t>(rows.size());
    // The odd number of cache lines keeps the rows of a chunk out of each other's cache sets.
    stride_ = round_up(vocab_, kNtColumns) + 16;
    if (stride_ / 16 % 2 == 0) stride_ += 16;
    int64_t limit = kChunkBytes / (4 * stride_);
    limit = std::clamp(limit, kMinChunkRows, kMaxChunkRows);
    chunks_ = (count + limit - 1) / limit;
    chunk_rows_ = chunks_ == 0 ? 0 : round_up((count + chunks_ - 1) / chunks_, kNtRows);
    chunks_ = chunks_ == 0 ? 0 : (count + chunk_rows_ - 1) / chunk_rows_;
    gathered_stride_ = round_up(width_, 2);
    logits_ = new_tensor({chunk_rows_, stride_}, ScalarType::Float);
    gathered_ = new_zeros({chunk_rows_, gathered_stride_}, dtype_);
    if (need_dhidden) {
      dhidden_ = count == hidden.size(0) ? new_tensor({hidden.size(0), width_}, dtype_)
                                         : new_zeros({hidden.size(0), width_}, dtype_);
    }
    if (need_dhead) {
      if (chunks_ <= 1 || dtype_ == ScalarType::Float) {
        dhead_ = count == 0 ? new_zeros({vocab_, width_}, dtype_) : new_tensor({vocab_, width_}, dtype_);
      } else {
        dhead_sum_ = new_tensor({vocab_, width_}, ScalarType::Float);
        if (!by_gemm_) dhead_chunk_ = new_tensor({vocab_, width_}, dtype_);
      }
    }
  }

  int64_t chunks() const { return chunks_; }
  int64_t first(int64_t chunk) const { return chunk * chunk_rows_; }  // index into `rows` of the chunk's first row
  int64_t size(int64_t chunk) const {
    return std::min(chunk_rows_, static_cast<int64_t>(rows_.size()) - chunk * chunk_rows_);
  }
  int64_t stride() const { return stride_; }  // floats from one row of logits to the next

  // Logits of a chunk, float32 [size, vocab] with the above stride; valid until the next call.
  float* logits(int64_t chunk) {
    const int64_t n = size(chunk);
    T* gathered = mutable_data<T>(gathered_);
    const T* hidden = data<T>(hidden_);
    const int64_t* rows = rows_.data() + first(chunk);
    torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(gathered + i * gathered_stride_, hidden + rows[i] * width_, width_ * sizeof(T));
      }
    });
    float* z = mutable_data<float>(logits_);
    if constexpr (sizeof(T) == sizeof(float)) {
      mm_out(block(logits_, n, vocab_), block(gathered_, n, width_), transposed(lm_head_));
    } else if (has_bf16_dot_product()) {
      const auto panels = kernels<MatmulNtKernels>().panels;
      torch::stable::parallel_for(0, (vocab_ + kNtColumns - 1) / kNtColumns, 1, [&](int64_t begin, int64_t end) {
        panels(gathered, gathered_stride_, data<T>(lm_head_), z, stride_, round_up(n, kNtRows), vocab_, width_, begin,
               end);
      });
    } else {
      // Without the instruction a bfloat16 matmul runs at float32 speed anyway. Slices keep the float32 copy of the
      // head small.
      constexpr int64_t kSlice = 4096;
      const Tensor a = torch::stable::to(block(gathered_, n, width_), ScalarType::Float);
      for (int64_t v = 0; v < vocab_; v += kSlice) {
        const int64_t columns = std::min(kSlice, vocab_ - v);
        Tensor head = lm_head_;
        head = torch::stable::to(torch::stable::narrow(head, 0, v, columns), ScalarType::Float);
        Tensor out = block(logits_, n, vocab_);
        mm_out(torch::stable::narrow(out, 1, v, columns), a, transposed(head));
      }
    }
    return z;
  }

  // Adds the chunk's part of the gradients; its logits have been overwritten by dlogits of type T, in place: row i
  // starts where row i of the logits started.
  void backward(int64_t chunk) {
    const int64_t n = size(chunk);
    const std::array<int64_t, 2> sizes{n, vocab_};
    const std::array<int64_t, 2> strides{stride_ * static_cast<int64_t>(sizeof(float) / sizeof(T)), 1};
    const Tensor dlogits =
        torch::stable::from_blob(mutable_data<float>(logits_), sizes, strides, hidden_.device(), dtype_);
    if (need_dhidden_) add_dhidden(chunk, n, dlogits);
    if (need_dhead_) add_dhead(chunk, n, dlogits);
  }

  Tensor dhidden() const { return dhidden_; }  // empty unless asked for
  Tensor dhead() const {
    return dhead_sum_.numel() > 0 ? torch::stable::to(dhead_sum_, dtype_) : dhead_;
  }

 private:
  static Tensor block(const Tensor& x, int64_t rows, int64_t columns) {
    Tensor whole = x;
    Tensor top = torch::stable::narrow(whole, 0, 0, rows);
    return torch::stable::narrow(top, 1, 0, columns);
  }

  void add_dhidden(int64_t chunk, int64_t n, const Tensor& dlogits) {
    const int64_t* rows = rows_.data() + first(chunk);
    Tensor all = dhidden_;
    const bool together = rows[n - 1] - rows[0] == n - 1;
    const Tensor compact = together ? torch::stable::narrow(all, 0, rows[0], n) : new_tensor({n, width_}, dtype_);
    if (by_gemm_) {
      gemm(compact, {gemm_term(dlogits, lm_head_)});
    } else {
      mm_out(compact, dlogits, lm_head_);
    }
    if (together) return;
    torch::stable::parallel_for(0, n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        std::memcpy(mutable_data<T>(dhidden_) + rows[i] * width_, data<T>(compact) + i * width_, width_ * sizeof(T));
      }
    });
  }

  // Sums over chunks are kept in float32.
  void add_dhead(int64_t chunk, int64_t n, const Tensor& dlogits) {
    const Tensor h = block(gathered_, n, width_);
    if (by_gemm_) {
      // dhead^T = hidden^T dlogits: what is transposed is small, and dlogits are read along their rows.
      const Tensor h_transposed = torch::stable::contiguous(transposed(h));
      gemm_add(transposed(dhead_sum_.numel() > 0 ? dhead_sum_ : dhead_), gemm_term(h_transposed, dlogits), chunk > 0);
    } else if (dhead_sum_.numel() > 0) {
      if (chunk == 0) dhead_sum_ = torch::stable::zero_(dhead_sum_);
      mm_out(dhead_chunk_, transposed(dlogits), h);
      torch::stable::parallel_for(0, vocab_ * width_, 1 << 15, [&](int64_t begin, int64_t end) {
        accumulate(mutable_data<float>(dhead_sum_), data<T>(dhead_chunk_), begin, end);
      });
    } else if (chunk == 0) {
      mm_out(dhead_, transposed(dlogits), h);
    } else {
      addmm_(dhead_, transposed(dlogits), h);
    }
  }

  static void accumulate(float* sum, const T* x, int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) sum[i] += FORGE_ISA::to_float(x[i]);
  }

  const Tensor hidden_, lm_head_;  // contiguous
  const std::vector<int64_t>& rows_;
  int64_t vocab_, width_, stride_ = 0, chunks_ = 0, chunk_rows_ = 0, gathered_stride_ = 0;
  ScalarType dtype_;
  Tensor dhidden_, dhead_, dhead_sum_, dhead_chunk_, logits_, gathered_;
  bool need_dhidden_, need_dhead_;
  // torch's own matmuls are slow on dlogits, whose rows are spaced as the float32 logits were.
  const bool by_gemm_ = sizeof(T) == sizeof(bf16) && has_bf16_dot_product();
};

}  // namespace forge
