// Cuts a pack into the tasks of packed_attention. For packed_attention.cpp alone.
#pragma once

#include <algorithm>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/packed_attention.h"
#include "cpu/tensor.h"
#include "data/pack_tree.h"

namespace forge {

// Queries of a backward task; a longer document is split into at most kMaxChunks tasks, whose dk and dv are added up in
// their order: the sums do not depend on the number of threads.
constexpr int64_t kChunkQueries = 1024;
constexpr int64_t kMaxChunks = 4;
// Candidates that continue the same document are done one after the other, this many queries or an eighth of them all,
// and add to the same sums over its keys: memory for sums does not grow with their number.
constexpr int64_t kGroupQueries = 512;
constexpr int64_t kMaxGroups = 8;
constexpr int64_t kRowsPerTask = 4 * kLanes;

// The documents of a pack and what each of them sees.
struct AttentionPack {
  data_plane::PackTree tree;
  std::vector<KeySpan> spans;

  AttentionPack(const int32_t* bounds, const int32_t* parents, int64_t documents) : tree(bounds, parents, documents) {
    for (const data_plane::Span& s : tree.spans()) spans.push_back({s.start, s.end, s.row, s.document});
  }
  const data_plane::Span& own(int64_t document) const { return tree.own(document); }
  AttentionTask task(int64_t document, int64_t begin, int64_t end) const {
    const int64_t first = tree.first(document);
    return {spans.data() + first, tree.first(document + 1) - first, begin, end};
  }
};

inline data_plane::TileOptions visibility(const AttentionShape& s) {
  data_plane::TileOptions options;
  options.causal = s.causal;
  options.window = static_cast<int32_t>(s.window);
  return options;
}

inline std::vector<AttentionTask> own_tasks(const AttentionShape& s, const AttentionPack& pack) {
  data_plane::TileOptions options = visibility(s);
  options.row_tile = static_cast<int32_t>(std::max<int64_t>(1, kRowsPerTask / s.group));
  std::vector<AttentionTask> tasks;
  for (const data_plane::Tile& tile : data_plane::forward_tiles(pack.tree, options).tiles) {
    tasks.push_back(pack.task(tile.document, tile.row_start, tile.row_end));
  }
  return tasks;
}

// Query rows of a plan, which must cover every row of every document once.
inline std::vector<AttentionTask> planned_tasks(const Tensor& tiles, const AttentionPack& pack, const int32_t* bounds) {
  FORGE_CHECK(tiles.scalar_type() == ScalarType::Int && tiles.dim() == 2 && tiles.size(1) == 8 && tiles.is_contiguous(),
              "plan", "tiles of another shape or dtype", "int32 [tiles, 8]");
  const int64_t documents = pack.tree.documents();
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
    tasks.push_back(pack.task(document, begin, end));
  }
  const auto missing = std::find(covered.begin(), covered.end(), 0);
  FORGE_CHECK(missing == covered.end(), "plan", "no tile with row " << missing - covered.begin(),
              "every row once: make the plan from the same cu_seqlens");
  return tasks;
}

// Tasks that one thread does in this order, since they add to the same sums.
struct BackwardUnit {
  std::vector<AttentionTask> tasks;
  int64_t pairs = 0, queries = 0;        // visible pairs
  int64_t partial_rows = 0, partial = -1;  // where its sums lie, in floats; none: it completes dk and dv itself
};

// A document whose dk and dv are sums over units; each holds the positions [from, to) of the sum.
struct SharedKeys {
  struct Source {
    size_t unit;
    int64_t from, to;
  };
  data_plane::Span rows;
  std::vector<Source> sources;
};

struct BackwardWork {
  std::vector<BackwardUnit> units;
  std::vector<size_t> order;  // of the units: the longest first
  std::vector<SharedKeys> shared;
  int64_t partial_floats = 0, most_keys = 0;
};

// The work of one head; floats_per_row: of one position in the sums of all heads.
inline BackwardWork backward_work(const AttentionShape& s, const AttentionPack& pack, int64_t floats_per_row) {
  const data_plane::TileOptions options = visibility(s);
  const int64_t documents = pack.tree.documents();
  BackwardWork work;
  // Documents that others continue; the queries of those that none continues, by the document they continue.
  std::vector<char> continued(static_cast<size_t>(documents), 0);
  std::vector<int64_t> candidate_rows(static_cast<size_t>(documents), 0);
  const auto last_ancestor = [&](int64_t d) { return pack.spans[pack.tree.first(d + 1) - 2].document; };
  for (int64_t d = 0; d < documents; ++d) {
    if (pack.own(d).start == pack.own(d).end) continue;
    for (int64_t i = pack.tree.first(d); i + 1 < pack.tree.first(d + 1); ++i) continued[pack.spans[i].document] = 1;
    if (pack.own(d).start > 0) candidate_rows[last_ancestor(d)] += pack.own(d).end - pack.own(d).start;
  }
  constexpr size_t kNone = std::numeric_limits<size_t>::max();
  std::vector<size_t> group(static_cast<size_t>(documents), kNone);  // by ancestor: the unit that takes candidates
  std::vector<size_t> shared(static_cast<size_t>(documents), kNone);

  const auto add_source = [&](const KeySpan& span, size_t unit, int64_t from, int64_t to) {
    if (shared[span.document] == kNone) {
      shared[span.document] = work.shared.size();
      work.shared.push_back({pack.own(span.document), {}});
    }
    work.shared[shared[span.document]].sources.push_back({unit, std::max(from, span.start), std::min(to, span.end)});
  };
  for (int64_t d = 0; d < documents; ++d) {
    const data_plane::Span& own = pack.own(d);
    const int64_t length = own.end - own.start;
    const int64_t chunk = std::max(kChunkQueries, (length + kMaxChunks - 1) / kMaxChunks);
    const bool whole = !continued[d] && length <= chunk;
    for (int64_t begin = 0; begin < length; begin += chunk) {
      const int64_t end = std::min(length, begin + chunk);
      AttentionTask task = pack.task(d, own.row + begin, own.row + end);
      const int64_t from = data_plane::detail::visible_keys(own.start + begin, own.end, options).first;
      const int64_t to = data_plane::detail::visible_keys(own.start + end - 1, own.end, options).last;
      work.most_keys = std::max(work.most_keys, to - from);
      size_t unit = work.units.size();
      if (whole && own.start > 0) {
        size_t& open = group[last_ancestor(d)];
        const int64_t limit = std::max(kGroupQueries, candidate_rows[last_ancestor(d)] / kMaxGroups);
        if (open != kNone && work.units[open].queries + length <= limit) {
          unit = open;
          task.zero_from = own.start;
        }
        open = unit;
      }
      const bool first = unit == work.units.size();
      if (first) work.units.emplace_back();
      task.final_from = whole ? own.start : own.end;
      if (first && !(whole && own.start == 0)) {
        for (int64_t i = 0; i < task.span_count - (whole ? 1 : 0); ++i) add_source(task.spans[i], unit, from, to);
        work.units[unit].partial = 0;
      }
      BackwardUnit& u = work.units[unit];
      u.tasks.push_back(task);
      u.queries += end - begin;
      u.pairs += data_plane::detail::keys_before(own.start + end, own.end, options) -
                 data_plane::detail::keys_before(own.start + begin, own.end, options);
      u.partial_rows = std::max(u.partial_rows, own.end);
    }
  }
  for (size_t i = 0; i < work.units.size(); ++i) {
    work.order.push_back(i);
    if (work.units[i].partial < 0) continue;
    work.units[i].partial = work.partial_floats;
    work.partial_floats += work.units[i].partial_rows * floats_per_row;
  }
  std::stable_sort(work.order.begin(), work.order.end(),
                   [&](size_t a, size_t b) { return work.units[a].pairs > work.units[b].pairs; });
  return work;
}

}  // namespace forge
