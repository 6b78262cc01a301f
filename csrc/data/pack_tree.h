// Packs in which documents continue others, such as candidates that answer one prompt: the tree, and its tiles.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "data/pack_plan.h"

namespace forge::data_plane {

// Rows of one document among those that a document sees.
struct Span {
  std::int64_t start, end;  // positions: rows of the ancestors, from the root on, then the document's own
  std::int64_t row;         // of the pack, at position `start`
  std::int64_t document;
};

// What each document sees. parents [documents]: the document that each one continues, before it in the pack, or -1;
// null where none does.
class PackTree {
 public:
  PackTree(const std::int32_t* cu_seqlens, const std::int32_t* parents, std::int64_t documents)
      : first_{0}, rows_(cu_seqlens[documents]) {
    for (std::int64_t d = 0; d < documents; ++d) {
      const std::int64_t parent = parents == nullptr ? -1 : parents[d];
      if (parent >= 0) {
        for (std::int64_t i = first_[parent]; i < first_[parent + 1]; ++i) {
          if (spans_[i].start < spans_[i].end) spans_.push_back(Span(spans_[i]));
        }
      }
      const std::int64_t start = parent >= 0 ? own(parent).end : 0;
      spans_.push_back({start, start + cu_seqlens[d + 1] - cu_seqlens[d], cu_seqlens[d], d});
      first_.push_back(static_cast<std::int64_t>(spans_.size()));
    }
  }

  // The first document whose parent is not -1 or a document before it; `documents` if there is none.
  static std::int64_t first_bad(const std::int32_t* parents, std::int64_t documents) {
    std::int64_t d = 0;
    while (d < documents && parents[d] >= -1 && parents[d] < d) ++d;
    return d;
  }

  std::int64_t documents() const { return static_cast<std::int64_t>(first_.size()) - 1; }
  std::int64_t rows() const { return rows_; }  // those that belong to a document
  const std::vector<Span>& spans() const { return spans_; }
  // The spans of document d are first(d) to first(d + 1) of them, the last one its own; no other one is empty.
  std::int64_t first(std::int64_t d) const { return first_[d]; }
  const Span& own(std::int64_t d) const { return spans_[first_[d + 1] - 1]; }

 private:
  std::vector<std::int64_t> first_;
  std::vector<Span> spans_;
  std::int64_t rows_;
};

// Columns of a tile in one document: those in [full_start, full_end) need no mask. With a window the others are seen as
// if the query stood `gap` rows further up; without one gap is 0.
struct ColumnRange {
  std::int32_t col_start, col_end, full_start, full_end, gap;
};

// Tiles as without sharing, and all that their rows meet. context: for each tile and for their end the index in context
// at which its ColumnRanges begin, that of its own columns first, then the ranges.
struct TreeTiles {
  std::vector<Tile> tiles;
  std::vector<std::int32_t> context;
};

namespace detail {

// Columns [0, count) of a document at `row` of the pack, of which some tile row sees [some.first, some.last), and all
// of them see [all.first, all.last).
inline ColumnRange column_range(std::int64_t row, std::int64_t count, Range some, Range all, std::int64_t tile,
                                std::int64_t gap) {
  const std::int64_t col_start = some.first / tile * tile;
  const std::int64_t full_start = (all.first + tile - 1) / tile * tile;
  const std::int64_t full_end = all.last == count ? count : all.last / tile * tile;
  const bool any_full = full_start < full_end;
  return {static_cast<std::int32_t>(row + col_start), static_cast<std::int32_t>(row + some.last),
          static_cast<std::int32_t>(row + (any_full ? full_start : col_start)),
          static_cast<std::int32_t>(row + (any_full ? full_end : col_start)), static_cast<std::int32_t>(gap)};
}

struct WithContext {
  Tile tile;
  std::vector<ColumnRange> ranges;
};

// Rows [begin, end) of the pack, of document `own`, against those of `other`, an ancestor or a descendant. The distance
// of a query and a key decides, in positions.
inline void add_context(const Span& own, const Span& other, bool rows_are_queries, const TileOptions& options,
                        WithContext& target) {
  const std::int64_t length = other.end - other.start;
  const std::int64_t begin = target.tile.row_start - own.row + own.start, end = target.tile.row_end - own.row + own.start;
  const auto seen = [&](std::int64_t position) -> Range {
    if (options.window == 0) return {0, length};
    if (rows_are_queries) return {std::clamp<std::int64_t>(position - options.window + 1 - other.start, 0, length), length};
    return {0, std::clamp<std::int64_t>(position + options.window - other.start, 0, length)};
  };
  const Range first = seen(begin), last = seen(end - 1);
  const Range some{std::min(first.first, last.first), std::max(first.last, last.last)};
  const Range all{std::max(first.first, last.first), std::min(first.last, last.last)};
  if (some.first >= some.last) return;
  std::int64_t pairs = options.window == 0 ? (end - begin) * length : 0;
  for (std::int64_t i = begin; options.window > 0 && i < end; ++i) pairs += seen(i).last - seen(i).first;
  target.tile.area = static_cast<std::int32_t>(std::min<std::int64_t>(target.tile.area + pairs, INT32_MAX));
  const Span& query = rows_are_queries ? own : other;
  const Span& key = rows_are_queries ? other : own;
  const std::int64_t gap = options.window == 0 ? 0 : (query.row - query.start) - (key.row - key.start);
  const ColumnRange range = column_range(other.row, length, some, all, options.col_tile, gap);
  // Without a window neighbours in the pack that are seen in full are one range.
  if (options.window == 0 && !target.ranges.empty() && target.ranges.back().col_end == range.col_start) {
    target.ranges.back().col_end = target.ranges.back().full_end = range.col_end;
  } else {
    target.ranges.push_back(range);
  }
}

inline TreeTiles in_order(std::vector<WithContext>&& made, const PackTree& tree, const TileOptions& options) {
  std::stable_sort(made.begin(), made.end(),
                   [](const WithContext& a, const WithContext& b) { return a.tile.area > b.tile.area; });
  TreeTiles result;
  for (const WithContext& m : made) result.tiles.push_back(m.tile);
  add_tail(tree.rows(), tree.documents(), options, result.tiles);
  std::size_t at = result.tiles.size() + 1;
  result.context.reserve(at);
  for (const WithContext& m : made) {
    result.context.push_back(static_cast<std::int32_t>(at));
    at += (1 + m.ranges.size()) * sizeof(ColumnRange) / sizeof(std::int32_t);
  }
  result.context.resize(result.tiles.size() + 1, static_cast<std::int32_t>(at));  // the tail has no columns
  result.context.reserve(at);
  for (const WithContext& m : made) {
    const Tile& t = m.tile;
    result.context.insert(result.context.end(), {t.col_start, t.col_end, t.full_start, t.full_end, 0});
    for (const ColumnRange& r : m.ranges) {
      result.context.insert(result.context.end(), {r.col_start, r.col_end, r.full_start, r.full_end, r.gap});
    }
  }
  return result;
}

}  // namespace detail

// Query tiles with the keys they read. options.causal must be set.
inline TreeTiles forward_tiles(const PackTree& tree, const TileOptions& options) {
  std::vector<detail::WithContext> made;
  for (std::int64_t d = 0; d < tree.documents(); ++d) {
    const Span& own = tree.own(d);
    const std::int64_t length = own.end - own.start;
    for (std::int64_t row = 0; row < length; row += options.row_tile) {
      const std::int64_t end = std::min<std::int64_t>(length, row + options.row_tile);
      made.push_back({detail::make_tile(d, own.row, row, end, length, options, detail::visible_keys, detail::keys_before),
                      {}});
      for (std::int64_t i = tree.first(d); i + 1 < tree.first(d + 1); ++i) {
        detail::add_context(own, tree.spans()[i], true, options, made.back());
      }
    }
  }
  return detail::in_order(std::move(made), tree, options);
}

// Key tiles with the queries that read them. Without a window descendants that follow their ancestor in the pack are
// columns of the tile itself, which then reaches past its document: the usual prompt and its candidates need no context.
inline TreeTiles backward_tiles(const PackTree& tree, const TileOptions& options) {
  std::vector<std::vector<std::int64_t>> descendants(static_cast<std::size_t>(tree.documents()));
  for (std::int64_t d = 0; d < tree.documents(); ++d) {
    if (tree.own(d).start == tree.own(d).end) continue;
    for (std::int64_t i = tree.first(d); i + 1 < tree.first(d + 1); ++i) {
      descendants[tree.spans()[i].document].push_back(d);
    }
  }
  std::vector<detail::WithContext> made;
  for (std::int64_t d = 0; d < tree.documents(); ++d) {
    const Span& own = tree.own(d);
    const std::int64_t length = own.end - own.start;
    std::int64_t columns = length;
    auto next = descendants[d].begin();
    for (; options.window == 0 && next != descendants[d].end() && tree.own(*next).row == own.row + columns; ++next) {
      columns += tree.own(*next).end - tree.own(*next).start;
    }
    for (std::int64_t row = 0; row < length; row += options.row_tile) {
      const std::int64_t end = std::min<std::int64_t>(length, row + options.row_tile);
      made.push_back({detail::make_tile(d, own.row, row, end, columns, options, detail::visible_queries,
                                        detail::queries_before), {}});
      for (auto other = next; other != descendants[d].end(); ++other) {
        detail::add_context(own, tree.own(*other), false, options, made.back());
      }
    }
  }
  return detail::in_order(std::move(made), tree, options);
}

}  // namespace forge::data_plane
