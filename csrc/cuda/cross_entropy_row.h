// Cross-entropy of one row of logits that is divided among the threads of a thread-block cluster: its arithmetic.
//
// A row of `vocab` float32 logits is cut into one slice per block of the cluster, a slice into packs of four logits, and
// thread t of a block owns packs t, t + kThreads, ... of its slice. Every function below is one thread's work between two
// exchanges; cross_entropy_rows.cu joins them by shuffles and a cluster barrier, cross_entropy_rows.cpp by plain loops on
// the CPU, where tests compare the result with torch.
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
#else
#define FORGE_UNROLL
#endif

namespace forge {
namespace cross_entropy {

constexpr int kPack = 4;         // logits of a 16-byte access
constexpr int kThreads = 512;    // of a block
constexpr int kWarp = 32;        // threads
constexpr int kWarps = kThreads / kWarp;
constexpr int kMaxCluster = 8;   // blocks, the most that every GPU with clusters runs
constexpr int kSums = 5;         // per source: weight * loss, weight * nll, weight, rows, rows predicted
constexpr float kLowest = -1e30f;  // below every logit, and finite: differences of two of them are no NaN

struct alignas(16) Logits {
  float v[kPack];
};

// What a thread, a warp or a block knows of a row.
struct alignas(16) RowPart {
  float top_before = kLowest;  // largest logit before the target's index
  float top_from = kLowest;    // largest logit from the target's index on
  float exp_sum = 0;           // sum of e^(y - top)
  float sum = 0;               // sum of y

  FORGE_HOST_DEVICE float top() const { return top_before > top_from ? top_before : top_from; }
};

struct Options {
  float softcap;    // 0: none
  float z_loss;
  float smoothing;
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

FORGE_HOST_DEVICE float capped(float z, float softcap) {
  return softcap > 0 ? softcap * hyperbolic_tangent(z / softcap) : z;
}

// Two parts of one row. Neither order nor grouping changes what it means, but both change how it rounds.
FORGE_HOST_DEVICE RowPart joined(const RowPart& a, const RowPart& b) {
  RowPart both;
  both.top_before = fmaxf(a.top_before, b.top_before);
  both.top_from = fmaxf(a.top_from, b.top_from);
  const float top = both.top();
  both.exp_sum = a.exp_sum * exponential(a.top() - top) + b.exp_sum * exponential(b.top() - top);
  both.sum = a.sum + b.sum;
  return both;
}

// A thread's part of the row. `kept`, the block's slice, holds raw logits and afterwards the softcapped ones, with
// kLowest behind the end of the vocabulary, so that no later loop asks where the row ends.
FORGE_HOST_DEVICE RowPart read_packs(Logits* kept, Slice slice, int thread, int vocab, int target, float softcap) {
  RowPart part;
  for (int i = thread; i < slice.packs; i += kThreads) {
    const int at = (slice.first + i) * kPack;
    const bool whole = at + kPack <= vocab;
    Logits y = kept[i];
    if (softcap > 0 || !whole) {
      FORGE_UNROLL
      for (int v = 0; v < kPack; ++v) y.v[v] = at + v < vocab ? capped(y.v[v], softcap) : kLowest;
      kept[i] = y;
    }
    FORGE_UNROLL
    for (int v = 0; v < kPack; ++v) {
      const bool before = at + v < target;
      part.top_before = fmaxf(part.top_before, before ? y.v[v] : kLowest);
      part.top_from = fmaxf(part.top_from, before ? kLowest : y.v[v]);
      part.sum += whole || at + v < vocab ? y.v[v] : 0.0f;
    }
  }
  const float top = part.top();
  for (int i = thread; i < slice.packs; i += kThreads) {
    const Logits y = kept[i];
    part.exp_sum += (exponential(y.v[0] - top) + exponential(y.v[1] - top)) +
                    (exponential(y.v[2] - top) + exponential(y.v[3] - top));
  }
  return part;
}

// What the gradient of a row is made of: dy = of_exp * e^(y - top) + constant, and at_target more at the target.
struct RowGradient {
  float top, of_exp, constant, at_target;
};

// `scale` is the row's weight over the normalizer. d(loss)/dy = p * (1 + 2 * z_loss * Z) - smoothing / vocab - (1 -
// smoothing) * onehot, p = e^(y - top) / exp_sum, Z = top + log(exp_sum).
FORGE_HOST_DEVICE RowGradient row_gradient(const RowPart& row, int vocab, float scale, const Options& options) {
  const float top = row.top();
  float of_exp = scale / row.exp_sum;
  if (options.z_loss > 0) of_exp *= 1.0f + 2.0f * options.z_loss * (top + logf(row.exp_sum));
  return {top, of_exp, -scale * options.smoothing / static_cast<float>(vocab), -scale * (1.0f - options.smoothing)};
}

// Adds a row to the sums of its source, [sources, kSums]. In float64: in float32 the logarithm alone would be as far off
// as all that came before.
FORGE_HOST_DEVICE void add_row(double* sums, int64_t source, double weight, const RowPart& row, float y_target,
                               int vocab, const Options& options) {
  const double top = static_cast<double>(row.top()), log_sum = log(static_cast<double>(row.exp_sum));
  const double log_z = top + log_sum, nll = log_sum - (static_cast<double>(y_target) - top);
  double loss = nll + static_cast<double>(options.z_loss) * log_z * log_z;
  if (options.smoothing > 0) {
    const double mean = static_cast<double>(row.sum) / static_cast<double>(vocab);
    loss += static_cast<double>(options.smoothing) * ((log_z - mean) - nll);
  }
  double* of_source = sums + source * kSums;
  of_source[0] += weight * loss;
  of_source[1] += weight * nll;
  of_source[2] += weight;
  of_source[3] += 1.0;
  // The target is the first index of the largest logit.
  of_source[4] += y_target >= row.top_from && y_target > row.top_before ? 1.0 : 0.0;
}

// dz of a pack whose softcapped logits are y.
FORGE_HOST_DEVICE Logits gradient(const Logits& y, int pack, int target, const RowGradient& row, float softcap) {
  Logits d;
  FORGE_UNROLL
  for (int v = 0; v < kPack; ++v) {
    d.v[v] = row.of_exp * exponential(y.v[v] - row.top) + row.constant;
    if (pack * kPack + v == target) d.v[v] += row.at_target;
    if (softcap > 0) {
      const float t = y.v[v] / softcap;  // dy/dz = 1 - tanh^2
      d.v[v] *= 1.0f - t * t;
    }
  }
  return d;
}

}  // namespace cross_entropy
}  // namespace forge
