"""Tile lists of the GPU kernels: those made on the device are the C++ plan's."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from forge_core.kernels import PackPlan, packed_attention
from forge_core.kernels.gpu import attention_blocks, attention_tiles
from forge_core.kernels.gpu.attention_tiles import device_list, plan_lists, tile_lists


def _rows(tiles: np.ndarray) -> list[list[int]]:
    # Without the empty tiles at the end and the area, which only orders them.
    return sorted(row[:7] for row in tiles.tolist() if row[1] < row[2])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 60), max_size=5),
    st.integers(0, 20),
    st.sampled_from([(16, 8), (5, 16), (32, 64)]),
    st.booleans(),
    st.sampled_from([None, 1, 6, 100]),
    st.booleans(),
)
def test_device_list_is_the_plan(
    documents: list[int], tail: int, tile: tuple[int, int], causal: bool, window: int | None, backward: bool
) -> None:
    cu_seqlens = np.concatenate([[0], np.cumsum(documents)]).astype(np.int32)
    tokens = int(cu_seqlens[-1]) + tail
    plan = PackPlan(cu_seqlens, q_tile=3, causal=not causal)
    lists = plan_lists(plan, tokens, (tile,) if backward else (tile, (4, 4)), causal, window)
    on_device = device_list(torch.from_numpy(cu_seqlens), tokens, tile, causal, window, backward)
    assert on_device.dtype == torch.int32 and on_device.shape == (tokens // tile[0] + len(documents) + 1, 8)
    assert _rows(on_device.numpy()) == _rows(lists[0])
    covered = np.zeros(tokens, int)
    for row in lists[0].tolist():
        covered[row[1] : row[2]] += 1
        assert row[1] < cu_seqlens[-1] or row[3] == row[4]  # a row of no document sees nothing
    assert (covered == 1).all()


def test_a_plan_is_uploaded_once_for_each_window() -> None:
    cu_seqlens = torch.tensor([0, 30, 50], dtype=torch.int32)
    plan = PackPlan(cu_seqlens.numpy())
    q, k = torch.zeros(60, 4, 8), torch.zeros(60, 2, 8)
    first = tile_lists(q, k, cu_seqlens, plan, True, None)
    assert tile_lists(q, k, cu_seqlens, plan, True, None) is first
    assert tile_lists(q, k, cu_seqlens, plan, True, 5) is not first
    assert len(attention_tiles._uploaded[plan]) == 2


def test_a_plan_of_other_documents_is_refused() -> None:
    q, k, cu_seqlens = torch.zeros(8, 2, 4), torch.zeros(8, 1, 4), torch.tensor([0, 6], dtype=torch.int32)
    for bounds, got in (
        ([0, 5], r"got one of cu_seqlens \[0, 5\]"),
        ([0, 9], "got one of 9"),
        ([0, 4, 6], "got one of 2"),
    ):
        with pytest.raises(ValueError, match=f"plan: {got}"):
            tile_lists(q, k, cu_seqlens, PackPlan(np.array(bounds, np.int32)), True, None)


@pytest.mark.parametrize("bounds", [[1, 4], [0, 3, 2, 4], [0, 5]])
def test_bad_cu_seqlens(bounds: list[int]) -> None:
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        tile_lists(torch.zeros(4, 2, 8), torch.zeros(4, 2, 8), cu_seqlens, None, True, None)
    # Where they cannot be looked at without waiting for a GPU, they still do not lead out of the pack.
    for backward in (False, True):
        tiles = device_list(cu_seqlens, 4, (2, 2), True, None, backward)
        assert tiles[:, 1:7].min() >= 0 and tiles[:, 1:7].max() <= 4


def test_head_dimensions_have_a_configuration() -> None:
    for d in (1, 16, 17, 64, 80, 96, 128, 255, 256):
        width = attention_blocks.padded_head_dim(d)
        assert width >= max(d, 16) and width & (width - 1) == 0 and width < 2 * max(d, 9)
    with pytest.raises(ValueError, match="takes head dimensions up to 256"):
        packed_attention(*[torch.zeros(2, 1, 300)] * 3, torch.tensor([0, 2], dtype=torch.int32), backend="triton")
