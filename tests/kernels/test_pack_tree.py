"""PackPlan where documents continue others: its lists and their contexts."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from forge_core.kernels import PackPlan


def _mask(lengths: list[int], parents: list[int], window: int | None) -> np.ndarray:
    """bool [tokens, tokens]: key j is visible to query i, by positions."""
    bounds, starts = np.array([0, *np.cumsum(lengths)], int), []
    position = np.zeros(bounds[-1], int)
    mask = np.zeros((bounds[-1], bounds[-1]), bool)
    for d, parent in enumerate(parents):
        starts.append(starts[parent] + lengths[parent] if parent >= 0 else 0)
        position[bounds[d] : bounds[d + 1]] = starts[d] + np.arange(lengths[d])
        seen = d
        while seen >= 0:
            mask[bounds[d] : bounds[d + 1], bounds[seen] : bounds[seen + 1]] = True
            seen = parents[seen]
    distance = position[:, None] - position
    return mask & (distance >= 0) & (distance < (window or len(position) + 1))


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    lengths = draw(st.lists(st.integers(0, 25), max_size=6))
    return lengths, [draw(st.integers(-1, d - 1)) for d in range(len(lengths))]


@settings(max_examples=150, deadline=None)
@given(trees(), st.sampled_from([(4, 4), (16, 8), (1, 5)]), st.sampled_from([None, 1, 6, 30]), st.integers(0, 20))
def test_contexts_cover_each_visible_pair_once(
    tree: tuple[list[int], list[int]], tile: tuple[int, int], window: int | None, tail: int
) -> None:
    lengths, parents = tree
    cu_seqlens = np.array([0, *np.cumsum(lengths)], np.int32)
    plan = PackPlan(cu_seqlens, window=window, parents=np.array(parents, np.int32))
    tokens = plan.tokens + tail
    mask = np.zeros((tokens, tokens), bool)
    mask[: plan.tokens, : plan.tokens] = _mask(lengths, parents, window)
    for backward, seen in ((False, mask), (True, mask.T)):
        options = {"causal": True, "window": window, "backward": backward}
        tiles, context = plan.tiles_and_context(*tile, **options, tokens=tokens)
        assert context is not None and np.array_equal(plan.tiles(*tile, **options), tiles[tiles[:, 0] < len(lengths)])
        covered, rows = np.zeros_like(seen, dtype=int), np.zeros(tokens, int)
        for t, (_, row_start, row_end, *own, area) in enumerate(tiles.tolist()):
            rows[row_start:row_end] += 1
            ranges = context[context[t] : context[t + 1]].reshape(-1, 5)
            assert seen[row_start:row_end].sum() == area
            assert (ranges[0].tolist() == [*own, 0]) if len(ranges) else (own[0] == own[1] and row_start >= plan.tokens)
            for col_start, col_end, full_start, full_end, gap in ranges.tolist():
                assert col_start <= full_start <= full_end <= col_end
                assert seen[row_start:row_end, full_start:full_end].all()
                i, j = np.meshgrid(np.arange(row_start, row_end), np.arange(col_start, col_end), indexing="ij")
                query, key = (j, i) if backward else (i, j)
                near = query - gap - key < window if window is not None else True
                covered[row_start:row_end, col_start:col_end] += (key <= query - gap) & near
        assert np.array_equal(covered, seen.astype(int)) and (rows == 1).all()
        assert np.all(np.diff(tiles[:, 7]) <= 0)  # longest first


def test_a_prompt_and_its_answers_are_one_range_of_queries() -> None:
    plan = PackPlan(np.array([0, 128, 192, 256], np.int32), parents=np.array([-1, 0, 0], np.int32))
    tiles, context = plan.tiles_and_context(64, 64, backward=True, causal=True, window=None)
    assert context is not None and tiles[0].tolist() == [0, 0, 64, 0, 256, 64, 256, 64 * 65 // 2 + 64 * 192]
    assert context[context[0] : context[1]].tolist() == [0, 256, 64, 256, 0]
    tiles, context = plan.tiles_and_context(64, 64, backward=False, causal=True, window=None)
    assert context is not None and tiles[0].tolist() == [1, 128, 192, 128, 192, 128, 128, 64 * 65 // 2 + 64 * 128]
    assert context[context[0] : context[1]].tolist() == [128, 192, 128, 128, 0, 0, 128, 0, 128, 0]


def test_errors() -> None:
    cu_seqlens = np.array([0, 3, 5], np.int32)
    with pytest.raises(TypeError, match=r"parents: got int64 \[2\], expected int32 \[documents\], here \[2\]"):
        PackPlan(cu_seqlens, parents=np.array([-1, 0]))
    with pytest.raises(ValueError, match="parents: got 1 at index 1, expected -1, or a document before 1"):
        PackPlan(cu_seqlens, parents=np.array([-1, 1], np.int32))
    with pytest.raises(ValueError, match="causal: got False with parents"):
        PackPlan(cu_seqlens, causal=False, parents=np.array([-1, 0], np.int32))
