// Softmax of one row of logits that is divided among the threads of a thread-block cluster, and its gradient: the
// arithmetic.
//
// A row of `vocab` float32 logits is cut into one slice per block of the cluster, a slice into packs of four logits, and
// thread t of a block owns packs t, t + kThreads, ... of its slice. Every function below is one thread's work between two
// exchanges; logit_rows.cuh joins them by shuffles and a cluster barrier, logit_rows_cpu.h by plain loops on the CPU,
// where tests compare the result with torch.
//
// What a row's gradient is made of, and what else is wanted of a row, is the business of a `Job`: cross_entropy_rows.h,
// token_logprob_rows.h.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define FORGE_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FORGE_HOST_DEVICE inline
#endif
#if defined(__CUDA_ARCH__)
#define FORGE_UNROLL _Pragma("unroll")
#define FORGE_ROLLED _Pragma("unroll 1")
#else
#define FORGE_UNROLL
#define FORGE_ROLLED
#endif

namespace forge {
namespace logit_row {

constexpr int kPack = 4;         // logits of a 16-byte access
constexpr int kThreads = 512;    // of a block
constexpr int kWarp = 32;        // threads
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxCluster = 8;   // blocks, the most that every GPU with clusters runs
constexpr float kLowest = -1e30f;  // below every logit, and finite: differences of two of them are no NaN

struct alignas(16) Logits {
  float v[kPack];
};

// What a job wants of a row beside its softmax.
enum class Wanted {
  kPrediction,  // whether the target has the largest logit, and the sum of the logits
  kEntropy
};

// What a thread, a warp or a block knows of a row.
struct alignas(16) RowPart {
  float top_before = kLowest;  // largest logit before the target's index; unused for kEntropy
  float top_from = kLowest;    // largest logit from the target's index on; for kEntropy of all
  float exp_sum = 0;           // sum of e^(y - top)
  float sum = 0;               // sum of y; for kEntropy of e^(y - top) * (y - top)

  FORGE_HOST_DEVICE float top() const { return top_before > top_from ? top_before : top_from; }
};

// The packs of one block.
struct Slice {
  int first, packs;  // of the row

  FORGE_HOST_DEVICE static int largest(int vocab, int cluster) {
    return ((vocab + kPack - 1) / kPack + cluster - 1) / cluster;
  }
  FORGE_HOST_DEVICE static Slice of(int vocab, int cluster, int rank) {
    const int each = largest(vocab, cluster), first = each * rank, left = (vocab + kPack - 1) / kPack - first;
    return {first, left < 0 ? 0 : left < each ? left : each};
  }
};

FORGE_HOST_DEVICE float exponential(float x) {
  x *= 1.4426950408889634f;  // log2(e)
#if defined(__CUDA_ARCH__)
  float y;  // 2 ulp; a result that would be denormal is 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// tanh(x) within 2 ulp: a polynomial below |x| = 0.6, 1 - 2 t / (1 + t) with t = e^-2|x| above.
FORGE_HOST_DEVICE float hyperbolic_tangent(float x) {
  const float magnitude = fabsf(x), t = exponential(-2.0f * magnitude), s = x * x;
  const float large = 1.0f - 2.0f * t / (1.0f + t);  // rounded once near 1, unlike (1 - t) / (1 + t)
  float p = -0.005856427851185549f * s + 0.020757475434213055f;
  p = p * s - 0.05376992178162181f;
  p = p * s + 0.1333170470213052f;
  p = p * s - 0.3333328397177112f;
  p = p * s + 0.9999999975630964f;
  return magnitude < 0.6f ? x * p : x < 0 ? -large : large;
}

// From a logit z of the matmul to y, whose softmax is the distribution: y = limit * tanh(z / softcap), limit = softcap *
// scale; without a softcap y = scale * z.
struct Cap {
  float softcap;  // 0: none
  float scale;    // 1 / temperature
  float limit;

  FORGE_HOST_DEVICE bool changes() const { return softcap > 0 || scale != 1.0f; }
  FORGE_HOST_DEVICE float operator()(float z) const {
    return softcap > 0 ? limit * hyperbolic_tangent(z / softcap) : scale * z;
  }
  FORGE_HOST_DEVICE float slope(float y) const {  // dy/dz = scale * (1 - tanh^2)
    if (!(softcap > 0)) return scale;
    const float t = y / limit;
    return scale * (1.0f - t * t);
  }
};

// Two parts of one row. Neither order nor grouping changes what it means, but both change how it rounds.
template <Wanted kWanted>
FORGE_HOST_DEVICE RowPart joined(const RowPart& a, const RowPart& b) {
  RowPart both;
  both.top_before = fmaxf(a.top_before, b.top_before);
  both.top_from = fmaxf(a.top_from, b.top_from);
  const float shift_a = a.top() - both.top(), shift_b = b.top() - both.top();
  const float factor_a = exponential(shift_a), factor_b = exponential(shift_b);
  both.exp_sum = a.exp_sum * factor_a + b.exp_sum * factor_b;
  both.sum = kWanted == Wanted::kEntropy
                 ? (a.sum + a.exp_sum * shift_a) * factor_a + (b.sum + b.exp_sum * shift_b) * factor_b
                 : a.sum + b.sum;
  return both;
}

// A thread's part of the row. `kept`, the block's slice, holds raw logits and afterwards y, with kLowest behind the end
// of the vocabulary, so that no later loop asks where the row ends.
template <Wanted kWanted>
FORGE_HOST_DEVICE RowPart read_packs(Logits* kept, Slice slice, int thread, int vocab, int target, Cap cap) {
  RowPart part;
  for (int i = thread; i < slice.packs; i += kThreads) {
    const int at = (slice.first + i) * kPack;
    const bool whole = at + kPack <= vocab;
    Logits y = kept[i];
    if (cap.changes() || !whole) {
      FORGE_UNROLL
      for (int v = 0; v < kPack; ++v) y.v[v] = at + v < vocab ? cap(y.v[v]) : kLowest;
      kept[i] = y;
    }
    FORGE_UNROLL
    for (int v = 0; v < kPack; ++v) {
      if (kWanted == Wanted::kEntropy) {
        part.top_from = fmaxf(part.top_from, y.v[v]);
        continue;
      }
      const bool before = at + v < target;
      part.top_before = fmaxf(part.top_before, before ? y.v[v] : kLowest);
      part.top_from = fmaxf(part.top_from, before ? kLowest : y.v[v]);
      part.sum += whole || at + v < vocab ? y.v[v] : 0.0f;
    }
  }
  const float top = part.top();
  FORGE_ROLLED  // unrolled, cross-entropy spills on sm_100
  for (int i = thread; i < slice.packs; i += kThreads) {
    const Logits y = kept[i];
    float e[kPack];
    FORGE_UNROLL
    for (int v = 0; v < kPack; ++v) e[v] = exponential(y.v[v] - top);
    part.exp_sum += (e[0] + e[1]) + (e[2] + e[3]);
    if (kWanted == Wanted::kEntropy) {
      part.sum += (e[0] * (y.v[0] - top) + e[1] * (y.v[1] - top)) + (e[2] * (y.v[2] - top) + e[3] * (y.v[3] - top));
    }
  }
  return part;
}

// The part's log(exp_sum) and log-probability of the target, in float64: in float32 the logarithm alone would be as far
// off as all that came before.
FORGE_HOST_DEVICE double log_sum(const RowPart& row) { return log(static_cast<double>(row.exp_sum)); }
FORGE_HOST_DEVICE double logprob(const RowPart& row, float y_target) {
  return (static_cast<double>(y_target) - static_cast<double>(row.top())) - log_sum(row);
}

// dy = (of_exp + of_shifted_exp * (y - top)) * e^(y - top) + constant, and at_target more at the target.
struct RowGradient {
  float top, of_exp, of_shifted_exp, constant, at_target;
};

// dz of a pack whose logits are y.
template <Wanted kWanted>
FORGE_HOST_DEVICE Logits gradient(const Logits& y, int pack, int target, const RowGradient& row, Cap cap) {
  Logits d;
  FORGE_UNROLL
  for (int v = 0; v < kPack; ++v) {
    const float shifted = y.v[v] - row.top;
    const float factor = kWanted == Wanted::kEntropy ? row.of_exp + row.of_shifted_exp * shifted : row.of_exp;
    d.v[v] = factor * exponential(shifted) + row.constant;
    if (pack * kPack + v == target) d.v[v] += row.at_target;
    if (cap.changes()) d.v[v] *= cap.slope(y.v[v]);
  }
  return d;
}

}  // namespace logit_row
}  // namespace forge
