// packed_attention: softmax(mask(cap(scale * q k^T))) v inside each document. This file checks the arguments and cuts
// the pack into tasks; the loops are in packed_attention_tiles.cpp and avx512_bf16/packed_attention.cpp.
#include "cpu/isa.h"

#if FORGE_ISA_LEVEL == 0

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>

#include "cpu/packed_attention.h"
#include "cpu/tensor.h"
#include "data/pack_plan.h"

namespace forge {
namespace {

// Queries of a backward task; a longer document is split into at most kMaxChunks tasks, whose dk and dv are added up in
// their order: the sums do not depend on the number of threads.
constexpr int64_t kChunkQueries = 1024;
constexpr int64_t kMaxChunks = 4;
constexpr int64_t kRowsPerTask = 4 * kLanes;

AttentionShape check_inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, bool causal,
                            int64_t window, double softcap, double scale) {
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
  FORGE_CHECK(window >= 0, "window", window, "at least 1, or 0 for none");
  return {q.size(0), q.size(1), q.size(1) / k.size(1), q.size(2), std::min<int64_t>(window, INT32_MAX),
          causal,    static_cast<float>(scale), static_cast<float>(softcap)};
}

Tensor with_unit_stride(const Tensor& x) { return x.stride(2) == 1 ? x : as_contiguous(x); }

template <class T>
Heads<const T> heads(const Tensor& x) {
  return {data<T>(x), x.stride(0), x.stride(1)};
}

// Calls run(task, scratch) for all tasks, in their order of start; every thread takes the next one when it is free.
template <class F>
void run_tasks(const std::vector<AttentionTask>& tasks, int64_t scratch_floats, const F& run) {
  const int64_t floats = (scratch_floats + 15) / 16 * 16;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  const Tensor scratch = new_tensor({threads, floats}, ScalarType::Float);
  float* base = mutable_data<float>(scratch);
  std::atomic<size_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    for (size_t i = next++; i < tasks.size(); i = next++) run(tasks[i], base + thread * floats);
  });
}

// Query rows of a plan, which must cover every row of every document once.
std::vector<AttentionTask> planned_tasks(const Tensor& tiles, const int32_t* bounds, int64_t documents) {
  FORGE_CHECK(tiles.scalar_type() == ScalarType::Int && tiles.dim() == 2 && tiles.size(1) == 8 && tiles.is_contiguous(),
              "plan", "tiles of another shape or dtype", "int32 [tiles, 8]");
  std::vector<AttentionTask> tasks;
  std::vector<char> covered(static_cast<size_t>(bounds[documents]), 0);
  const int32_t* tile = data<int32_t>(tiles);
  for (int64_t i = 0; i < tiles.size(0); ++i, tile += 8) {
    const int32_t document = tile[0], begin = tile[1], end = tile[2];
    const bool inside = document >= 0 && document < documents && begin < end && begin >= bounds[document] &&
                        end <= bounds[document + 1];
    FORGE_CHECK(inside, "plan", "rows " << begin << " to " << end << " of document " << document,
                "rows of a document of cu_seqlens: make the plan from the same cu_seqlens");
    for (int64_t row = begin; row < end; ++row) {
      FORGE_CHECK(covered[row] == 0, "plan", "row " << row << " twice", "every row once");
      covered[row] = 1;
    }
    tasks.push_back({bounds[document], bounds[document + 1], 0, begin, end, nullptr});
  }
  const auto missing = std::find(covered.begin(), covered.end(), 0);
  FORGE_CHECK(missing == covered.end(), "plan", "no tile with row " << missing - covered.begin(),
              "every row once: make the plan from the same cu_seqlens");
  return tasks;
}

data_plane::TileOptions visibility(const AttentionShape& s) {
  data_plane::TileOptions options;
  options.causal = s.causal;
  options.window = static_cast<int32_t>(s.window);
  return options;
}

std::vector<AttentionTask> own_tasks(const AttentionShape& s, const int32_t* bounds, int64_t documents) {
  data_plane::TileOptions options = visibility(s);
  options.row_tile = static_cast<int32_t>(std::max<int64_t>(1, kRowsPerTask / s.group));
  std::vector<AttentionTask> tasks;
  for (const data_plane::Tile& tile : data_plane::forward_tiles(bounds, documents, options)) {
    tasks.push_back({bounds[tile.document], bounds[tile.document + 1], 0, tile.row_start, tile.row_end, nullptr});
  }
  return tasks;
}

// The tasks of one head for all; floats_per_row: of one head in partial.
std::vector<AttentionTask> for_each_head(const std::vector<AttentionTask>& tasks, int64_t kv_heads,
                                         int64_t floats_per_row = 0) {
  std::vector<AttentionTask> result;
  result.reserve(tasks.size() * static_cast<size_t>(kv_heads));
  for (AttentionTask task : tasks) {
    for (task.kv_head = 0; task.kv_head < kv_heads; ++task.kv_head) {
      result.push_back(task);
      if (task.partial != nullptr) task.partial += (task.last - task.first) * floats_per_row;
    }
  }
  return result;
}

// Packs keys and values of every document and head, and tells the tasks where theirs are.
template <class T>
Tensor pack_documents(const AttentionShape& s, const PackedAttentionKernels<T>& kernel, const int32_t* bounds,
                      int64_t documents, Heads<const T> k, Heads<const T> v, std::vector<AttentionTask>& tasks) {
  if (kernel.pack == nullptr) return new_tensor({0}, ScalarType::Float);
  const int64_t kv_heads = s.q_heads / s.group;
  std::vector<int64_t> start{0};  // of each document, for all heads
  std::vector<AttentionTask> whole;
  for (int64_t i = 0; i < documents; ++i) {
    start.push_back(start[i] + kv_heads * kernel.packed_size(s.d, bounds[i + 1] - bounds[i]));
    if (bounds[i] < bounds[i + 1]) whole.push_back({bounds[i], bounds[i + 1], 0, bounds[i], bounds[i + 1], nullptr});
  }
  Tensor packed = new_tensor({start[documents]}, ScalarType::Float);
  float* base = mutable_data<float>(packed);
  const auto place = [&](const AttentionTask& t) {
    const int64_t document = std::upper_bound(bounds, bounds + documents, t.first) - bounds - 1;
    return base + start[document] + t.kv_head * kernel.packed_size(s.d, t.last - t.first);
  };
  for (AttentionTask& task : tasks) task.packed = place(task);
  run_tasks(for_each_head(whole, kv_heads), 0,
            [&](const AttentionTask& t, float*) { kernel.pack(s, t, k, v, place(t)); });
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
                                            bool causal, int64_t window, double softcap, double scale) {
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_any);
  const AttentionShape shape = check_inputs(q_any, k_any, v_any, cu_seqlens, causal, window, softcap, scale);
  const Tensor q = with_unit_stride(q_any), k = with_unit_stride(k_any), v = with_unit_stride(v_any);
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t documents = cu_seqlens.numel() - 1;
  std::vector<AttentionTask> tasks = for_each_head(
      tiles ? planned_tasks(*tiles, bounds, documents) : own_tasks(shape, bounds, documents), k.size(1));
  Tensor out = new_tensor({shape.tokens, shape.q_heads, shape.d}, q.scalar_type());
  Tensor lse = new_zeros({shape.q_heads, shape.tokens}, ScalarType::Double);
  dispatch_float_bf16(q, "q", [&]<class T>() {
    const auto& kernel = kernels<PackedAttentionKernels<T>>();
    const Tensor packed = pack_documents(shape, kernel, bounds, documents, heads<T>(k), heads<T>(v), tasks);
    run_tasks(tasks, kernel.forward_scratch(shape.d), [&](const AttentionTask& task, float* scratch) {
      kernel.forward(shape, task, heads<T>(q), heads<T>(k), heads<T>(v), mutable_data<T>(out),
                     mutable_data<double>(lse), scratch);
    });
    zero_tail<T>(out, bounds[documents]);
  });
  return {out, lse};
}

// Backward tasks of one head, the longest work first, and the documents that are several of them.
struct SplitDocument {
  int64_t first, last, chunk;  // queries of a task
  float* partials;             // [tasks, kv_heads, 2, last - first, padded d]
};

struct BackwardWork {
  std::vector<AttentionTask> tasks;
  std::vector<SplitDocument> split;
  Tensor partials;
  int64_t most_keys = 0;
};

int64_t chunk_of(int64_t length) { return std::max(kChunkQueries, (length + kMaxChunks - 1) / kMaxChunks); }

BackwardWork backward_work(const AttentionShape& s, const int32_t* bounds, int64_t documents, int64_t padded_d) {
  BackwardWork work;
  const int64_t floats_per_row = s.q_heads / s.group * 2 * padded_d;
  int64_t rows = 0;
  for (int64_t i = 0; i < documents; ++i) {
    const int64_t length = bounds[i + 1] - bounds[i], chunk = chunk_of(length);
    if (length > chunk) rows += (length + chunk - 1) / chunk * length;
  }
  work.partials = new_tensor({rows * floats_per_row}, ScalarType::Float);
  float* partial = mutable_data<float>(work.partials);

  std::vector<std::pair<int64_t, AttentionTask>> weighed;  // visible pairs, task
  const data_plane::TileOptions options = visibility(s);
  for (int64_t i = 0; i < documents; ++i) {
    const int64_t first = bounds[i], last = bounds[i + 1], length = last - first, chunk = chunk_of(length);
    const bool split = length > chunk;
    if (split) work.split.push_back({first, last, chunk, partial});
    for (int64_t begin = 0; begin < length; begin += chunk) {
      const int64_t end = std::min(length, begin + chunk);
      int64_t pairs = 0;
      for (int64_t query = begin; query < end; ++query) {
        const data_plane::detail::Range keys = data_plane::detail::visible_keys(query, length, options);
        pairs += keys.last - keys.first;
      }
      work.most_keys = std::max(work.most_keys, data_plane::detail::visible_keys(end - 1, length, options).last -
                                                    data_plane::detail::visible_keys(begin, length, options).first);
      weighed.push_back({pairs, {first, last, 0, first + begin, first + end, split ? partial : nullptr}});
      if (split) partial += length * floats_per_row;
    }
  }
  std::stable_sort(weighed.begin(), weighed.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (const auto& [pairs, task] : weighed) work.tasks.push_back(task);
  return work;
}

// dk and dv of a split document: for every key the tasks that hold queries which see it, in their order.
template <class T>
void sum_split(const AttentionShape& s, const SplitDocument& document, int64_t padded_d, T* dk, T* dv) {
  const data_plane::TileOptions options = visibility(s);
  const int64_t length = document.last - document.first, kv_heads = s.q_heads / s.group;
  torch::stable::parallel_for(0, length, 64, [&](int64_t begin, int64_t end) {
    const float* sources[kMaxChunks];
    for (int64_t key = begin; key < end; ++key) {
      const data_plane::detail::Range seen_by = data_plane::detail::visible_queries(key, length, options);
      const int64_t from = seen_by.first / document.chunk, to = (seen_by.last - 1) / document.chunk;
      for (int64_t i = 0; i < 2 * kv_heads; ++i) {  // head i / 2; dk, then dv
        for (int64_t c = from; c <= to; ++c) {
          sources[c - from] = document.partials + ((c * 2 * kv_heads + i) * length + key) * padded_d;
        }
        T* target = (i % 2 == 0 ? dk : dv) + ((document.first + key) * kv_heads + i / 2) * s.d;
        kernels<PackedAttentionKernels<T>>().sum_partials(sources, to - from + 1, s.d, target);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> packed_attention_backward(const Tensor& dout_any, const Tensor& q_any,
                                                             const Tensor& k_any, const Tensor& v_any,
                                                             const Tensor& lse_any,
                                                             const Tensor& cu_seqlens_any, bool causal, int64_t window,
                                                             double softcap, double scale) {
  const Tensor cu_seqlens = as_contiguous(cu_seqlens_any);
  const AttentionShape shape = check_inputs(q_any, k_any, v_any, cu_seqlens, causal, window, softcap, scale);
  FORGE_CHECK(dout_any.dim() == 3 && dout_any.size(0) == shape.tokens && dout_any.size(1) == shape.q_heads &&
                  dout_any.size(2) == shape.d && dout_any.scalar_type() == q_any.scalar_type(),
              "dout", "another shape or dtype", "shape and dtype of q");
  FORGE_CHECK(lse_any.dim() == 2 && lse_any.size(0) == shape.q_heads && lse_any.size(1) == shape.tokens &&
                  lse_any.scalar_type() == ScalarType::Double,
              "lse", "another shape or dtype", "float64 [q_heads, tokens]");
  const Tensor q = with_unit_stride(q_any), k = with_unit_stride(k_any), v = with_unit_stride(v_any);
  const Tensor dout = with_unit_stride(dout_any), lse = as_contiguous(lse_any);
  const int32_t* bounds = data<int32_t>(cu_seqlens);
  const int64_t documents = cu_seqlens.numel() - 1, kv_heads = k.size(1);
  const ScalarType dtype = q.scalar_type();
  Tensor dq = new_tensor({shape.tokens, shape.q_heads, shape.d}, dtype);
  Tensor dk = new_tensor({shape.tokens, kv_heads, shape.d}, dtype);
  Tensor dv = new_tensor({shape.tokens, kv_heads, shape.d}, dtype);
  dispatch_float_bf16(q, "q", [&]<class T>() {
    const auto& kernel = kernels<PackedAttentionKernels<T>>();
    const int64_t padded_d = kernel.padded(shape.d);
    const BackwardWork work = backward_work(shape, bounds, documents, padded_d);
    run_tasks(for_each_head(work.tasks, kv_heads, 2 * padded_d), kernel.backward_scratch(shape.d, work.most_keys),
              [&](const AttentionTask& task, float* scratch) {
                kernel.backward(shape, task, heads<T>(q), heads<T>(k), heads<T>(v), heads<T>(dout), data<double>(lse),
                                mutable_data<T>(dq), mutable_data<T>(dk), mutable_data<T>(dv), scratch);
              });
    for (const SplitDocument& document : work.split) {
      sum_split(shape, document, padded_d, mutable_data<T>(dk), mutable_data<T>(dv));
    }
    for (const Tensor* gradient : {&dq, &dk, &dv}) zero_tail<T>(*gradient, bounds[documents]);
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
