// Attention tiles of one pack, made once per batch on the CPU. No torch, no Python: ops include this header.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace forge::data_plane {

// One unit of attention work. Rows are rows of the pack. In the forward list `row` spans queries and `col` keys;
// in the backward list `row` spans keys and `col` queries. Columns in [full_start, full_end) need no mask: every
// pair there is visible. Laid out as 8 int32 so that a list is an int32 array [tiles, 8].
struct Tile {
  std::int32_t document;
  std::int32_t row_start, row_end;
  std::int32_t col_start, col_end;
  std::int32_t full_start, full_end;
  std::int32_t area;  // visible (query, key) pairs, saturated: the cost by which tiles are ordered
};
static_assert(sizeof(Tile) == 8 * sizeof(std::int32_t));

// Query i sees key j of the same document iff
//   causal:      i - window < j <= i        otherwise:  |i - j| < window        (window 0: no limit)
struct TileOptions {
  std::int32_t row_tile = 64;   // rows per tile, counted from the document's first row
  std::int32_t col_tile = 64;   // col_start and full_* fall on multiples of this within the document
  bool causal = true;
  std::int32_t window = 0;
  std::int64_t tokens = 0;      // rows of the pack: those past the last document get tiles without columns, at the end
};

namespace detail {

struct Range {
  std::int64_t first, last;  // half open; empty when last <= first
};

// Keys seen by query i of a document of `length` rows.
inline Range visible_keys(std::int64_t i, std::int64_t length, const TileOptions& options) {
  const std::int64_t reach = options.window > 0 ? options.window : length;
  return {std::max<std::int64_t>(0, i - reach + 1),
          options.causal ? i + 1 : std::min<std::int64_t>(length, i + reach)};
}

// Queries that see key j: the mirror image.
inline Range visible_queries(std::int64_t j, std::int64_t length, const TileOptions& options) {
  const std::int64_t reach = options.window > 0 ? options.window : length;
  return {options.causal ? j : std::max<std::int64_t>(0, j - reach + 1),
          std::min<std::int64_t>(length, j + reach)};
}

// Visible pairs of the rows before `row`, in closed form: a difference of two is the area of a tile.
inline std::int64_t triangle(std::int64_t n) { return n > 0 ? n * (n + 1) / 2 : 0; }

// Sum over i < row of min(length, i + reach).
inline std::int64_t sum_of_ends(std::int64_t row, std::int64_t length, std::int64_t reach) {
  const std::int64_t short_of_length = std::max<std::int64_t>(0, length - reach);
  const std::int64_t shorter = std::min(row, short_of_length);
  return row * length - shorter * short_of_length + triangle(shorter - 1);
}

inline std::int64_t keys_before(std::int64_t row, std::int64_t length, const TileOptions& options) {
  const std::int64_t reach = options.window > 0 ? options.window : length;
  return (options.causal ? triangle(row) : sum_of_ends(row, length, reach)) - triangle(row - reach);
}

inline std::int64_t queries_before(std::int64_t row, std::int64_t length, const TileOptions& options) {
  const std::int64_t reach = options.window > 0 ? options.window : length;
  return sum_of_ends(row, length, reach) - triangle(options.causal ? row - 1 : row - reach);
}

// The tile of rows [row, end) of document d, counted from its first row, whose columns are `length` rows from there on.
template <typename Visible, typename PairsBefore>
Tile make_tile(std::int64_t d, std::int64_t base, std::int64_t row, std::int64_t end, std::int64_t length,
               const TileOptions& options, Visible visible, PairsBefore pairs_before) {
  const Range first = visible(row, length, options);
  const Range last = visible(end - 1, length, options);
  const std::int64_t tile = options.col_tile;
  // Both ends of the visible range move forward with the row, so the union is [first.first, last.last) and the columns
  // that all rows see are [last.first, first.last).
  const std::int64_t col_start = first.first / tile * tile;
  const std::int64_t full_start = (last.first + tile - 1) / tile * tile;
  const std::int64_t inner = std::min(first.last, last.last);
  const std::int64_t full_end = inner == length ? inner : inner / tile * tile;
  const std::int64_t area = pairs_before(end, length, options) - pairs_before(row, length, options);
  const bool any_full = full_start < full_end;
  return {static_cast<std::int32_t>(d),
          static_cast<std::int32_t>(base + row),
          static_cast<std::int32_t>(base + end),
          static_cast<std::int32_t>(base + col_start),
          static_cast<std::int32_t>(base + last.last),
          static_cast<std::int32_t>(base + (any_full ? full_start : col_start)),
          static_cast<std::int32_t>(base + (any_full ? full_end : col_start)),
          static_cast<std::int32_t>(std::min<std::int64_t>(area, INT32_MAX))};
}

inline std::size_t most_tiles(const std::int32_t* cu_seqlens, std::int64_t documents, const TileOptions& options) {
  const std::int64_t rows = std::max<std::int64_t>(options.tokens, cu_seqlens[documents]);
  return static_cast<std::size_t>(rows / options.row_tile + documents + 1);
}

// Tiles of the rows from `row` on, which belong to no document.
inline void add_tail(std::int64_t row, std::int64_t documents, const TileOptions& options, std::vector<Tile>& tiles) {
  for (; row < options.tokens; row += options.row_tile) {
    const std::int32_t start = static_cast<std::int32_t>(row);
    const std::int64_t end = std::min(options.tokens, row + options.row_tile);
    tiles.push_back({static_cast<std::int32_t>(documents), start, static_cast<std::int32_t>(end), start, start, start,
                     start, 0});
  }
}

template <typename Visible, typename PairsBefore>
std::vector<Tile> make_tiles(const std::int32_t* cu_seqlens, std::int64_t documents, const TileOptions& options,
                             Visible visible, PairsBefore pairs_before) {
  std::vector<Tile> tiles;
  tiles.reserve(most_tiles(cu_seqlens, documents, options));
  for (std::int64_t d = 0; d < documents; ++d) {
    const std::int64_t base = cu_seqlens[d];
    const std::int64_t length = cu_seqlens[d + 1] - base;
    for (std::int64_t row = 0; row < length; row += options.row_tile) {
      const std::int64_t end = std::min<std::int64_t>(length, row + options.row_tile);
      tiles.push_back(make_tile(d, base, row, end, length, options, visible, pairs_before));
    }
  }
  // Longest processing time first; ties keep pack order, which keeps a document's keys warm in cache.
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& a, const Tile& b) { return a.area > b.area; });
  add_tail(cu_seqlens[documents], documents, options, tiles);
  return tiles;
}

}  // namespace detail

// cu_seqlens [documents + 1] starts at 0 and does not fall; zero-length documents make no tile.
// Query tiles with the keys they read.
inline std::vector<Tile> forward_tiles(const std::int32_t* cu_seqlens, std::int64_t documents,
                                       const TileOptions& options) {
  return detail::make_tiles(cu_seqlens, documents, options, detail::visible_keys, detail::keys_before);
}

// Key tiles with the queries that read them: dK and dV without atomics.
inline std::vector<Tile> backward_tiles(const std::int32_t* cu_seqlens, std::int64_t documents,
                                        const TileOptions& options) {
  return detail::make_tiles(cu_seqlens, documents, options, detail::visible_queries, detail::queries_before);
}

}  // namespace forge::data_plane
