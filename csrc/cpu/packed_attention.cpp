// packed_attention: softmax(mask(cap(scale * q k^T))) v inside each document. This file checks the arguments and runs
// the tasks that packed_attention_work.h cuts the pack into; the loops are in packed_attention_tiles.cpp and
// avx512_bf16/packed_attention.cpp.
#include "cpu/isa.h"

#if FORGE_ISA_LEVEL == 0

#include <algorithm>
#include <atomic>
#include <optional>

#include "cpu/packed_attention_work.h"

namespace forge {
namespace {

AttentionShape check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens,
                            const std::optional<Tensor>& parents, bool causal, int64_t window, double softcap,
                            double scale) {
  FORGE_CHECK(q.dim() == 3 && q.size(1) > 0 && q.size(2) > 0, "q", "a tensor of " << q.dim() << " dimensions",
              "[tokens, q_heads, d]");
  for (const Tensor* x : {&k, &v}) {
    FORGE_CHECK(x->dim() == 3 && x->size(0) == q.size(0) && x->size(1) == k.size(1) && x->size(2) == q.size(2) &&
                    x->size(1) > 0 && q.size(1) % x->size(1) == 0 && x->scalar_type() == q.scalar_type(),
                (x == &k ? "k" : "v"), "a tensor of " << x->dim() << " dimensions, " << toString(x->scalar_type()),
                "[tokens, kv_heads, d] with tokens, d and dtype of q, kv_heads a divisor of q_heads");
  }
  FORGE_CHECK(cu_seqlens.scalar_type() == ScalarType::Int && cu_seqlens.dim() == 1 && cu_seqlens.numel() > 0,
              "cu_seqlens", toString(cu_seqlens.scalar_type()) << " of " << cu_seqlens.numel() << " elements",
              "int32 [documents + 1]");
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t documents = cu_seqlens.numel() - 1;
  FORGE_CHECK(bounds[0] == 0, "cu_seqlens", bounds[0] << " at index 0", "0");
  for (int64_t i = 0; i < documents; ++i) {
    FORGE_CHECK(bounds[i] <= bounds[i + 1], "cu_seqlens", bounds[i + 1] << " at index " << i + 1,
                "at least its predecessor " << bounds[i]);
  }
  FORGE_CHECK(bounds[documents] <= q.size(0), "cu_seqlens", bounds[documents] << " at its end",
              "at most " << q.size(0) << ", the number of tokens");
  if (parents) {
    FORGE_CHECK(parents->scalar_type() == ScalarType::Int && parents->dim() == 1 && parents->numel() == documents,
                "parents", toString(parents->scalar_type()) << " of " << parents->numel() << " elements",
                "int32 [documents], here " << documents);
    const int32_t* parent = data<int32_t>(*parents);
    const int64_t bad = data_plane::PackTree::first_bad(parent, documents);
    FORGE_CHECK(bad == documents, "parents", parent[bad] << " at index " << bad, "-1, or a document before " << bad);
    FORGE_CHECK(causal, "causal", "false with parents",
                "true: a document before its continuation would have to see it");
  }
  FORGE_CHECK(window >= 0, "window", window, "at least 1, or 0 for none");
  return {q.size(0), q.size(1), q.size(1) / k.size(1), q.size(2), std::min<int64_t>(window, INT32_MAX),
          causal,    static_cast<float>(scale), static_cast<float>(softcap)};
}

std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional<Tensor>(as_contiguous(*x)) : std::nullopt;
}

AttentionPack make_pack(const Tensor& cu_seqlens, const std::optional<Tensor>& parents) {
  return {data<int32_t>(cu_seqlens), parents ? data<int32_t>(*parents) : nullptr, cu_seqlens.numel() - 1};
}

Tensor with_unit_stride(const Tensor& x) { return x.stride(2) == 1 ? x : as_contiguous(x); }

template <class T>
Heads<const T> heads(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1)};
}

// Calls run(i, scratch) for all i < count, in their order of start; every thread takes the next one when it is free.
template <class F>
void run_all(int64_t count, int64_t scratch_floats, const F& run) {
  const int64_t floats = (scratch_floats + 15) / 16 * 16;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), count);
  const Tensor scratch = new_tensor({threads, floats}, ScalarType::Float);
  float* base = mutable_data<float>(scratch);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (int64_t i = next++; i < count; i = next++) run(i, base + thread * floats);
  });
}

// Packs keys and values of every document and head, and tells the spans where theirs are.
template <class T>
Tensor pack_documents(const AttentionShape& s, const PackedAttentionKernels<T>& kernel, Heads<const T> k,
                      Heads<const T> v, AttentionPack& pack) {
  if (kernel.pack == nullptr) return new_tensor({0}, ScalarType::Float);
  const int64_t kv_heads = s.q_heads / s.group, documents = pack.tree.documents();
  const auto size = [&](int64_t document) {  // of one head
    return kernel.packed_size(s.d, pack.own(document).end - pack.own(document).start);
  };
  std::vector<int64_t> start{0};  // of each document, for all heads
  for (int64_t i = 0; i < documents; ++i) start.push_back(start[i] + kv_heads * size(i));
  Tensor packed = new_tensor({start[documents]}, ScalarType::Float);
  float* base = mutable_data<float>(packed);
  for (KeySpan& span : pack.spans) span.packed = base + start[span.document];
  run_all(documents * kv_heads, 0, [&](int64_t i, float*) {
    const int64_t document = i / kv_heads, head = i % kv_heads;
    const KeySpan& span = pack.spans[pack.tree.first(document + 1) - 1];
    kernel.pack(s, span, head, k, v, base + start[document] + head * size(document));
  });
  return packed;
}

// Zeroes the rows from `first` on: tokens behind the last document.
template <class T>
void zero_tail(const Tensor& x, int64_t first) {
  const int64_t row = x.size(1) * x.size(2);
  std::fill(mutable_data<T>(x) + first * row, mutable_data<T>(x) + x.size(0) * row, T{});
}

std::tuple<Tensor, Tensor> packed_attention(const Tensor& q_any, const Tensor& k_any, const Tensor& v_any,
                                            const Tensor& cu_seqlens_any, const std::optional<Tensor>& tiles,
                                            bool causal, int64_t window, double softcap, double scale,
                                            const std::optional<Tensor>& parents_any) {
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_any);
  const std::optional<Tensor> parents = contiguous(parents_any);
  const AttentionShape shape = check_inputs(q_any, k_any, v_any, cu_seqlens, parents, causal, window, softcap, scale);
  const Tensor q = with_unit_stride(q_any), k = with_unit_stride(k_any), v = with_unit_stride(v_any);
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t kv_heads = k.size(1);
  AttentionPack pack = make_pack(cu_seqlens, parents);
  const std::vector<AttentionTask> tasks = tiles ? planned_tasks(*tiles, pack, bounds) : own_tasks(shape, pack);
  Tensor out = new_tensor({shape.tokens, shape.q_heads, shape.d}, q.scalar_type());
  Tensor lse = new_zeros({shape.q_heads, shape.tokens}, ScalarType::Double);
  dispatch_float_bf16(q, "q", [&]<class T>() {
    const auto& kernel = kernels<PackedAttentionKernels<T>>();
    const Tensor packed = pack_documents(shape, kernel, heads<T>(k), heads<T>(v), pack);
    const int64_t count = static_cast<int64_t>(tasks.size()) * kv_heads;
    run_all(count, kernel.forward_scratch(shape.d), [&](int64_t i, float* scratch) {
      AttentionTask task = tasks[i / kv_heads];
      task.kv_head = i % kv_heads;
      kernel.forward(shape, task, heads<T>(q), heads<T>(k), heads<T>(v), mutable_data<T>(out),
                     mutable_data<double>(lse), scratch);
    });
    zero_tail<T>(out, bounds[pack.tree.documents()]);
  });
  return {out, lse};
}

// dk and dv of a document whose keys several units see: for every key the units that do, in their order.
template <class T>
void sum_shared(const AttentionShape& s, const BackwardWork& work, const SharedKeys& keys, const float* partials,
                int64_t padded_d, T* dk, T* dv) {
  const PackedAttentionKernels<T>& kernel = kernels<PackedAttentionKernels<T>>();
  const int64_t kv_heads = s.q_heads / s.group;
  const float dk_factor = kernel.partial_dk_factor(s);
  torch::stable::parallel_for(keys.rows.start, keys.rows.end, 64, [&](int64_t begin, int64_t end) {
    std::vector<const float*> sources;
    for (int64_t key = begin; key < end; ++key) {
      for (int64_t i = 0; i < 2 * kv_heads; ++i) {  // head i / 2; dk, then dv
        sources.clear();
        for (const SharedKeys::Source& source : keys.sources) {
          if (key < source.from || key >= source.to) continue;
          const BackwardUnit& unit = work.units[source.unit];
          sources.push_back(partials + unit.partial + (i * unit.partial_rows + key) * padded_d);
        }
        T* target = (i % 2 == 0 ? dk : dv) + ((keys.rows.row + key - keys.rows.start) * kv_heads + i / 2) * s.d;
        kernel.sum_partials(sources.data(), static_cast<int64_t>(sources.size()), s.d, i % 2 == 0 ? dk_factor : 1.0f,
                            target);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& dout_any, const Tensor& q_any,
                                                             const Tensor& k_any, const Tensor& v_any,
                                                             const Tensor& lse_any, const Tensor& cu_seqlens_any,
                                                             bool causal, int64_t window, double softcap, double scale,
                                                             const std::optional<Tensor>& parents_any) {
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_any);
  const std::optional<Tensor> parents = contiguous(parents_any);
  const AttentionShape shape = check_inputs(q_any, k_any, v_any, cu_seqlens, parents, causal, window, softcap, scale);
  FORGE_CHECK(dout_any.dim() == 3 && dout_any.size(0) == shape.tokens && dout_any.size(1) == shape.q_heads &&
                  dout_any.size(2) == shape.d && dout_any.scalar_type() == q_any.scalar_type(),
              "dout", "another shape or dtype", "shape and dtype of q");
  FORGE_CHECK(lse_any.dim() == 2 && lse_any.size(0) == shape.q_heads && lse_any.size(1) == shape.tokens &&
                  lse_any.scalar_type() == ScalarType::Double,
              "lse", "another shape or dtype", "float64 [q_heads, tokens]");
  const Tensor q = with_unit_stride(q_any), k = with_unit_stride(k_any), v = with_unit_stride(v_any);
  const Tensor dout = with_unit_stride(dout_any), lse = as_contiguous(lse_any);
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t kv_heads = k.size(1);
  const AttentionPack pack = make_pack(cu_seqlens, parents);
  const ScalarType dtype = q.scalar_type();
  Tensor dq = new_tensor({shape.tokens, shape.q_heads, shape.d}, dtype);
  Tensor dk = new_tensor({shape.tokens, kv_heads, shape.d}, dtype);
  Tensor dv = new_tensor({shape.tokens, kv_heads, shape.d}, dtype);
  dispatch_float_bf16(q, "q", [&]<class T>() {
    const auto& kernel = kernels<PackedAttentionKernels<T>>();
    const int64_t padded_d = kernel.padded(shape.d);
    const BackwardWork work = backward_work(shape, pack, kv_heads * 2 * padded_d);
    const Tensor partials = new_tensor({work.partial_floats}, ScalarType::Float);
    const int64_t count = static_cast<int64_t>(work.units.size()) * kv_heads;
    run_all(count, kernel.backward_scratch(shape.d, work.most_keys), [&](int64_t i, float* scratch) {
      const BackwardUnit& unit = work.units[work.order[i / kv_heads]];
      for (AttentionTask task : unit.tasks) {
        task.kv_head = i % kv_heads;
        task.partial_rows = unit.partial_rows;
        if (unit.partial >= 0) {
          task.partial = mutable_data<float>(partials) + unit.partial + task.kv_head * 2 * unit.partial_rows * padded_d;
        }
        kernel.backward(shape, task, heads<T>(q), heads<T>(k), heads<T>(v), heads<T>(dout), data<double>(lse),
                        mutable_data<T>(dq), mutable_data<T>(dk), mutable_data<T>(dv), scratch);
      }
    });
    for (const SharedKeys& keys : work.shared) {
      sum_shared(shape, work, keys, data<float>(partials), padded_d, mutable_data<T>(dk), mutable_data<T>(dv));
    }
    for (const Tensor* gradient : {&dq, &dk, &dv}) zero_tail<T>(*gradient, bounds[pack.tree.documents()]);
  });
  return {dq, dk, dv};
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) {
  m.impl("packed_attention", TORCH_BOX(&packed_attention));
  m.impl("packed_attention_backward", TORCH_BOX(&packed_attention_backward));
}

}  // namespace
}  // namespace forge

#endif
