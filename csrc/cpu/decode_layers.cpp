// decode_layers: one new token of each sequence through all layers of a decoder, in one call. A layer is five phases on
// torch's threads: query/key/value; rope, cache and attention; output; gate/up; down. Norms are taken by every thread for
// itself in front of a matmul, and activation and residual sum behind it, where the rows are in a cache.
#include "cpu/vec.h"

namespace forge {

struct AddKernels {
  // x [size] += y, rounded.
  void (*add)(bf16* x, const bf16* y, int64_t size);
};

namespace FORGE_ISA {
namespace {

void add(bf16* x, const bf16* y, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) x[i] = from_float<bf16>(to_float(x[i]) + to_float(y[i]));
}

const RegisterKernels<AddKernels> register_kernels({&add});

}  // namespace
}  // namespace FORGE_ISA
}  // namespace forge

#if FORGE_ISA_LEVEL == 0

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/decode_layers.h"
#include "cpu/decode_tasks.h"
#include "cpu/few_rows_linear.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"
#include "cpu/swiglu.h"

namespace forge {
namespace decoding {
namespace {

// Rows that go into a matmul, normed first where norm is not null.
struct Input {
  const bf16* rows;
  int64_t width;
  const bf16* norm;
};

// Weights to be read next, row stride ld; null: none.
struct Rest {
  const bf16* weight;
  int64_t ld;
};

Rest rest_of(const Linear& linear, int64_t row) { return {linear.weight + row * linear.depth, linear.depth}; }

// What a thread holds while it works on its strips of a group of linear layers.
struct Worker {
  float *tile, *second_tile;  // [kStrip, lanes]
  std::vector<uint32_t*> packed;  // the input, then its product with each layer's lora_a
  Rest following;                 // what this thread reads first in the next phase of linear layers
};

// The first of the linear layers of a phase, and the strips of all of them; null behind the last phase.
struct Phase {
  const Linear* first;
  int64_t strips;
};

int64_t strips_of(int64_t outputs) { return (outputs + kStrip - 1) / kStrip; }

// At most kFewRows sequences on their way through the layers.
class Rows {
 public:
  Rows(const Model& model, bf16* x, int64_t rows, int64_t first_row, const int64_t* positions)
      : m_(model), x_(x), rows_(rows), vectors_(few_rows_vectors(rows)), first_row_(first_row), positions_(positions) {
    int64_t rank = 0;
    for (const Layer& layer : m_.layers) {
      rank = std::max({rank, layer.q.rank + layer.k.rank + layer.v.rank, layer.o.rank,
                       layer.gate.rank + layer.up.rank, layer.down.rank});
    }
    const int64_t heads = (m_.q_heads + 2 * m_.kv_heads) * m_.d;
    buffer_ = new_tensor({rows * (heads + m_.q_heads * m_.d + m_.hidden + m_.inner + rank)}, ScalarType::BFloat16);
    qkv_ = mutable_data<bf16>(buffer_);
    attended_ = qkv_ + rows * heads;
    branch_ = attended_ + rows * m_.q_heads * m_.d;
    inner_ = branch_ + rows * m_.hidden;
    shrunk_ = inner_ + rows * m_.inner;
    for (int64_t i = 0; i < rows; ++i) lengths_.push_back(positions[i] + 1);
  }

  // next: the layer after this one, or null.
  void run(const Layer& layer, const Layer* next) {
    const int64_t heads = (m_.q_heads + 2 * m_.kv_heads) * m_.d, q = m_.q_heads * m_.d, kv = m_.kv_heads * m_.d;
    const std::vector<Linear> projections{layer.q, layer.k, layer.v};
    const int64_t columns[] = {0, q, q + kv};
    const std::vector<Linear> pair{layer.gate, layer.up};
    linear_group({x_, m_.hidden, layer.pre_attention}, projections, {q, kv, kv}, {&layer.o, strips_of(m_.hidden)},
                 [&](const Worker& worker, size_t i, int64_t first, int64_t count, bool last) {
                   const bool whole = first + count == projections[i].outputs && i < 2;
                   const Rest rest = last    ? worker.following
                                     : whole ? rest_of(projections[i + 1], 0)
                                             : rest_of(projections[i], first + count);
                   multiply(worker, projections, i, first, count, rest, worker.tile);
                   store(worker.tile, count, nullptr, qkv_ + columns[i] + first, heads);
                 });
    attend(layer);
    add_branch({attended_, q, nullptr}, layer.o, layer.post_attention, {&layer.gate, strips_of(m_.inner)});
    linear_group({x_, m_.hidden, layer.pre_mlp}, pair, {m_.inner}, {&layer.down, strips_of(m_.hidden)},
                 [&](const Worker& worker, size_t, int64_t first, int64_t count, bool last) {
                   multiply(worker, pair, 0, first, count, rest_of(layer.up, first), worker.tile);
                   const Rest rest = last ? worker.following : rest_of(layer.gate, first + count);
                   multiply(worker, pair, 1, first, count, rest, worker.second_tile);
                   kernels<SwigluKernels<float>>().forward(worker.tile, worker.second_tile, worker.tile, 0,
                                                           count * 16 * vectors_, m_.gelu);
                   store(worker.tile, count, nullptr, inner_ + first, m_.inner);
                 });
    add_branch({inner_, m_.inner, nullptr}, layer.down, layer.post_mlp,
               {next == nullptr ? nullptr : &next->q, strips_of(q) + 2 * strips_of(kv)});
  }

 private:
  // Calls strip(worker, i, first, count, last) for all strips of `outputs`, as for_strips() does; adapters' products with
  // the input come first.
  template <class Strip>
  void linear_group(const Input& input, const std::vector<Linear>& linears, const std::vector<int64_t>& outputs,
                    const Phase& following, const Strip& strip) {
    std::vector<int64_t> ranks;
    int64_t rank = 0;
    for (const Linear& linear : linears) {
      ranks.push_back(linear.rank);
      rank += linear.rank;
    }
    if (rank > 0) {
      for_strips(
          ranks, [&](int64_t) { return prepare(input, {}, rank); },
          [&](const Worker& worker, size_t i, int64_t first, int64_t count, bool) {
            const FewRowsTerm term{linears[i].lora_a, linears[i].depth, linears[i].depth, worker.packed[0],
                                   linears[i].lora_a, linears[i].depth};
            kernels<FewRowsKernels>().multiply(&term, 1, nullptr, first, count, vectors_, worker.tile);
            const int64_t column = std::accumulate(ranks.begin(), ranks.begin() + static_cast<int64_t>(i), int64_t{0});
            store(worker.tile, count, nullptr, shrunk_ + column + first, rank);
          });
    }
    const int64_t threads = torch::stable::get_num_threads(), own = (following.strips + threads - 1) / threads;
    for_strips(
        outputs,
        [&](int64_t thread) {
          Worker worker = prepare(input, ranks, rank);
          const int64_t row = thread * own * kStrip;  // a group's first layer is its largest: most threads start in it
          if (following.first != nullptr && row < following.first->outputs) {
            worker.following = rest_of(*following.first, row);
          }
          return worker;
        },
        strip);
  }

  // Norms and packs the input, and packs what an earlier phase left in shrunk_ for layers of these ranks.
  Worker prepare(const Input& input, const std::vector<int64_t>& ranks, int64_t rank) const {
    int64_t words = few_rows_packed(rows_, input.width);
    for (int64_t r : ranks) words += few_rows_packed(rows_, r);
    const int64_t tiles = 2 * kTileFloats, normed = (rows_ * input.width / 2 + 16) / 16 * 16;
    float* scratch = reinterpret_cast<float*>(thread_scratch(4 * (tiles + words + normed + kFewRows)));
    uint32_t* packed = reinterpret_cast<uint32_t*>(scratch + tiles);
    const auto& kernel = kernels<FewRowsKernels>();
    const bf16* rows = input.rows;
    if (input.norm != nullptr) {
      float* rstd = scratch + tiles + words;
      bf16* target = reinterpret_cast<bf16*>(rstd + kFewRows);
      kernels<RmsNormKernels<bf16>>().forward(rows, input.norm, target, rstd, 0, rows_, input.width, m_.eps,
                                              m_.weight_offset);
      rows = target;
    }
    Worker worker{scratch, scratch + kTileFloats, {packed}, {nullptr, 0}};
    kernel.pack(rows, input.width, rows_, input.width, packed);
    packed += few_rows_packed(rows_, input.width);
    const bf16* shrunk = shrunk_;
    for (int64_t r : ranks) {
      worker.packed.push_back(packed);
      kernel.pack(shrunk, rank, rows_, r, packed);
      packed += few_rows_packed(rows_, r);
      shrunk += r;
    }
    return worker;
  }

  // tile = outputs [first, first + count) of linears[i].
  void multiply(const Worker& worker, const std::vector<Linear>& linears, size_t i, int64_t first, int64_t count,
                const Rest& rest, float* tile) const {
    const auto& [weight, bias, lora_a, lora_b, outputs, depth, rank] = linears[i];
    const FewRowsTerm terms[] = {{weight, depth, depth, worker.packed[0], rest.weight, rest.ld},
                                 {lora_b, rank, rank, rank > 0 ? worker.packed[i + 1] : nullptr, lora_b, rank}};
    kernels<FewRowsKernels>().multiply(terms, rank > 0 ? 2 : 1, bias, first, count, vectors_, tile);
  }

  void store(const float* tile, int64_t count, const bf16* residual, bf16* y, int64_t ldy) const {
    kernels<FewRowsKernels>().store(tile, 1.0f, count, rows_, residual, y, ldy);
  }

  // x += linear(input), or the norm of that.
  void add_branch(const Input& input, const Linear& linear, const bf16* post_norm, const Phase& following) {
    const std::vector<Linear> one{linear};
    const bool adds = post_norm == nullptr;
    linear_group(input, one, {m_.hidden}, following,
                 [&](const Worker& worker, size_t, int64_t first, int64_t count, bool last) {
                   multiply(worker, one, 0, first, count, last ? worker.following : rest_of(linear, first + count),
                            worker.tile);
                   store(worker.tile, count, adds ? x_ + first : nullptr, (adds ? x_ : branch_) + first, m_.hidden);
                 });
    if (post_norm == nullptr) return;
    each_row([&](int64_t row) {
      bf16* branch = branch_ + row * m_.hidden;
      norm(branch, post_norm, 1, m_.hidden);
      kernels<AddKernels>().add(x_ + row * m_.hidden, branch, m_.hidden);
    });
  }

  // Norms of query and key, rope, the new rows of the cache, attention over it.
  void attend(const Layer& layer) {
    const int64_t d = m_.d, q = m_.q_heads * d, kv = m_.kv_heads * d, width = q + 2 * kv;
    const int64_t group = m_.q_heads / m_.kv_heads, cache = first_row_ * m_.kv_heads * m_.capacity * d;
    if (layer.q_norm != nullptr && !layer.norm_per_head) {
      each_row([&](int64_t row) {
        norm(qkv_ + row * width, layer.q_norm, 1, q);
        norm(qkv_ + row * width + q, layer.k_norm, 1, kv);
      });
    }
    const DecodeShape shape{m_.q_heads, m_.kv_heads, m_.capacity, d, layer.window, m_.scale, m_.softcap};
    run_balanced(balanced_tasks(shape, lengths_.data(), rows_), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t row = task / m_.kv_heads, head = task % m_.kv_heads, position = positions_[row];
        const int64_t at = cache + (task * m_.capacity + position) * d;
        bf16* query = qkv_ + row * width + head * group * d;
        bf16* key = qkv_ + row * width + q + head * d;
        if (layer.q_norm != nullptr && layer.norm_per_head) {
          norm(query, layer.q_norm, group, d);
          norm(key, layer.k_norm, 1, d);
        }
        const float *cos = layer.cos + position * (d / 2), *sin = layer.sin + position * (d / 2);
        const auto rotate = kernels<RopeKernels<bf16>>().rotate;
        rotate(query, cos, sin, query, 0, 1, group, d / 2, 1.0f);
        rotate(key, cos, sin, layer.keys + at, 0, 1, 1, d / 2, 1.0f);
        std::memcpy(layer.values + at, key + kv, static_cast<size_t>(d) * sizeof(bf16));
      }
      float* scratch = reinterpret_cast<float*>(thread_scratch(4 * decode_scratch(shape)));
      kernels<DecodeAttentionKernels<bf16>>().run(shape, qkv_, width, layer.keys + cache, layer.values + cache,
                                                  lengths_.data(), attended_, q, scratch, begin, end);
    });
  }

  // In place: [count, d] rows.
  void norm(bf16* x, const bf16* weight, int64_t count, int64_t d) const {
    float* rstd = reinterpret_cast<float*>(thread_scratch(4 * count));
    kernels<RmsNormKernels<bf16>>().forward(x, weight, x, rstd, 0, count, d, m_.eps, m_.weight_offset);
  }

  template <class F>
  void each_row(const F& f) const {
    torch::stable::parallel_for(0, rows_, 4, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) f(row);
    });
  }

  const Model& m_;
  bf16* x_;  // [rows, hidden]: the residual stream
  int64_t rows_, vectors_, first_row_;
  const int64_t* positions_;
  std::vector<int64_t> lengths_;
  Tensor buffer_;  // holds what follows
  bf16 *qkv_, *attended_, *branch_, *inner_, *shrunk_;
};

Model read_model(const Tensor& x, const std::vector<Tensor>& tables, const std::vector<Tensor>& keys,
                 const std::vector<Tensor>& values, const std::vector<Tensor>& tensors,
                 const std::vector<int64_t>& slots, const std::vector<int64_t>& windows,
                 const std::vector<int64_t>& table_of_layer, int64_t q_heads) {
  const size_t layers = keys.size();
  FORGE_CHECK(layers > 0 && values.size() == layers && windows.size() == layers && table_of_layer.size() == layers &&
                  slots.size() == layers * kSlots,
              "keys, values, slots, windows, table_of_layer", "lists for different numbers of layers",
              "one entry per layer, " << kSlots << " slots");
  Model m{};
  m.hidden = x.size(1);
  m.q_heads = q_heads;
  FORGE_CHECK(keys[0].dim() == 4 && keys[0].size(1) > 0 && q_heads % keys[0].size(1) == 0, "keys",
              keys[0].dim() << " dimensions", "[rows, kv_heads, capacity, d], q_heads a multiple of kv_heads");
  m.kv_heads = keys[0].size(1);
  m.capacity = keys[0].size(2);
  m.d = keys[0].size(3);
  m.positions = tables.empty() ? 0 : tables[0].size(0);
  for (const Tensor& table : tables) {
    FORGE_CHECK(table.dim() == 2 && table.scalar_type() == ScalarType::Float && table.is_contiguous() &&
                    table.size(0) == m.positions && 2 * table.size(1) == m.d,
                "tables", "another shape or dtype", "contiguous float32 [positions, " << m.d / 2 << "]");
  }
  for (size_t i = 0; i < layers; ++i) {
    for (const Tensor& cache : {keys[i], values[i]}) {
      FORGE_CHECK(cache.dim() == 4 && cache.size(0) >= x.size(0) && cache.size(1) == m.kv_heads &&
                      cache.size(2) == m.capacity && cache.size(3) == m.d && cache.is_contiguous() &&
                      cache.scalar_type() == ScalarType::BFloat16,
                  "keys, values", "another shape, dtype or layout in layer " << i,
                  "contiguous bfloat16 [at least " << x.size(0) << ", " << m.kv_heads << ", " << m.capacity << ", "
                                                   << m.d << "]");
    }
    FORGE_CHECK(table_of_layer[i] >= 0 && 2 * table_of_layer[i] + 1 < static_cast<int64_t>(tables.size()),
                "table_of_layer", table_of_layer[i], "the number of a pair of cos and sin in tables");
    const LayerSlots at(tensors, slots, static_cast<int64_t>(i));
    const int64_t q = q_heads * m.d, kv = m.kv_heads * m.d;
    Layer layer{};
    layer.pre_attention = at.vector(0, "pre_attention", m.hidden);
    layer.post_attention = at.vector(1, "post_attention", m.hidden);
    layer.pre_mlp = at.vector(2, "pre_mlp", m.hidden);
    layer.post_mlp = at.vector(3, "post_mlp", m.hidden);
    int64_t q_size = m.d, k_size = m.d;
    layer.q_norm = at.vector(4, "q_norm", m.d, q, &q_size);
    layer.k_norm = at.vector(5, "k_norm", m.d, kv, &k_size);
    layer.norm_per_head = q_size == m.d && k_size == m.d;
    FORGE_CHECK((layer.q_norm == nullptr) == (layer.k_norm == nullptr) &&
                    (layer.norm_per_head || (q_size == q && k_size == kv)),
                "q_norm, k_norm", "one per head and one over all, or only one", "both of the same kind");
    layer.q = at.linear(0, "q", q, m.hidden);
    layer.k = at.linear(1, "k", kv, m.hidden);
    layer.v = at.linear(2, "v", kv, m.hidden);
    layer.o = at.linear(3, "o", m.hidden, q);
    layer.gate = at.linear(4, "gate", i == 0 ? -1 : m.inner, m.hidden);
    m.inner = layer.gate.outputs;
    layer.up = at.linear(5, "up", m.inner, m.hidden);
    layer.down = at.linear(6, "down", m.hidden, m.inner);
    layer.keys = mutable_data<bf16>(keys[i]);
    layer.values = mutable_data<bf16>(values[i]);
    layer.cos = data<float>(tables[static_cast<size_t>(2 * table_of_layer[i])]);
    layer.sin = data<float>(tables[static_cast<size_t>(2 * table_of_layer[i] + 1)]);
    layer.window = windows[i];
    m.layers.push_back(layer);
  }
  return m;
}

Tensor decode_layers(const Tensor& x_any, const Tensor& positions_any, const std::vector<Tensor>& tables,
                     const std::vector<Tensor>& keys, const std::vector<Tensor>& values,
                     const std::vector<Tensor>& tensors, const std::vector<int64_t>& slots,
                     const std::vector<int64_t>& windows, const std::vector<int64_t>& table_of_layer, int64_t q_heads,
                     const std::string& activation, double eps, double weight_offset, double scale, double softcap) {
  FORGE_CHECK(has_bf16_dot_product(), "FORGE_CPU_ISA or this CPU", "no bfloat16 dot product",
              "AVX512-BF16; other CPUs run a decoder op by op");
  const Tensor x = as_contiguous(x_any), positions = as_contiguous(positions_any);
  FORGE_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16, "x", toString(x.scalar_type()),
              "bfloat16 [sequences, hidden]");
  FORGE_CHECK(positions.scalar_type() == ScalarType::Long && positions.dim() == 1 && positions.size(0) == x.size(0),
              "positions", toString(positions.scalar_type()) << " of " << positions.numel() << " elements",
              "int64 [" << x.size(0) << "]");
  Model model = read_model(x, tables, keys, values, tensors, slots, windows, table_of_layer, q_heads);
  model.eps = static_cast<float>(eps);
  model.weight_offset = static_cast<float>(weight_offset);
  model.scale = static_cast<float>(scale);
  model.softcap = static_cast<float>(softcap);
  model.gelu = is_gelu(activation);
  const int64_t* position = data<int64_t>(positions);
  const int64_t room = std::min(model.capacity, model.positions), sequences = x.size(0);
  for (int64_t i = 0; i < sequences; ++i) {
    FORGE_CHECK(position[i] >= 0 && position[i] < room, "positions", position[i] << " at index " << i,
                "0 to " << room - 1 << ", inside the cache and the tables");
  }
  const Tensor y = new_tensor({sequences, model.hidden}, ScalarType::BFloat16);
  std::memcpy(y.mutable_data_ptr(), x.const_data_ptr(), static_cast<size_t>(x.numel()) * sizeof(bf16));
  const int64_t parts = (sequences + kFewRows - 1) / kFewRows;
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t first = sequences * part / parts, count = sequences * (part + 1) / parts - first;
    Rows rows(model, mutable_data<bf16>(y) + first * model.hidden, count, first, position + first);
    for (size_t i = 0; i < model.layers.size(); ++i) {
      rows.run(model.layers[i], i + 1 < model.layers.size() ? &model.layers[i + 1] : nullptr);
    }
  }
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(forge, CPU, m) { m.impl("decode_layers", TORCH_BOX(&decode_layers)); }

}  // namespace
}  // namespace decoding
}  // namespace forge

#endif
