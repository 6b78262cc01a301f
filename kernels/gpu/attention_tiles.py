"""Tile lists of packed_attention's GPU kernels: a PackPlan's, or made on the device.

A pack in which documents continue others (`parents`) has lists of the same rows, int32 [tiles, 8], whose columns are
those of the tile's own document. Beside each list lies its context, a flat int32 vector with all columns of its tiles:
`context[t]:context[t + 1]` are the places in it of tile t's ranges, five numbers each, (col_start, col_end, full_start,
full_end, gap), the tile's own first; see `PackPlan.tiles_and_context`. A program runs its loops over columns once for
each range, with `query - gap` in the place of `query` where it masks. Without parents there is no context, and nothing
differs.
"""

from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from ..pack import PackPlan
from .attention_blocks import tile_sizes

_COLUMNS = len(PackPlan.COLUMNS)

_uploaded: WeakKeyDictionary[PackPlan, dict[tuple, tuple[Tensor, ...]]] = WeakKeyDictionary()


def tile_lists(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    plan: PackPlan | None,
    causal: bool,
    window: int | None,
    tiles: tuple[tuple[int, int], ...] | None = None,
    parents: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The lists of the forward, dQ and dK/dV kernels, int32 [tiles, 8] on the device of q; with parents also their
    contexts.

    `tiles` are the sizes of other kernels than Triton's, whose `tile_sizes` are the default.

    A plan's are uploaded by its first layer and kept for the others, until the plan goes. Without a plan, and in a
    compiled graph, where layers share what they compute alike, they are made on the device. Those with parents cannot
    be: there cu_seqlens and parents are copied to the host, for which the GPU is waited for.
    """
    tiles = tiles or tile_sizes(q, k)
    if parents is not None and torch.compiler.is_compiling():
        sizes = _tree_sizes(q.shape[0], parents.shape[0], tiles)
        flat = tree_lists(cu_seqlens, parents, q.shape[0], [n for tile in tiles for n in tile], window or 0)
        flat = flat.split([size for pair in sizes for size in pair])
        return *(x.view(-1, _COLUMNS) for x in flat[::2]), *flat[1::2]
    if parents is not None and plan is None:
        plan = _tree_plan(cu_seqlens, parents)
    if plan is None or torch.compiler.is_compiling():
        _require_offsets(cu_seqlens, q.shape[0])
        return tuple(device_list(cu_seqlens, q.shape[0], tile, causal, window, i == 2) for i, tile in enumerate(tiles))
    of_plan = _uploaded.setdefault(plan, {})
    key = (q.device, q.shape[0], tiles, causal, window)
    if key not in of_plan:
        made = _plan_lists(plan, q.shape[0], tiles, causal, window)
        of_plan[key] = _upload(plan, made, cu_seqlens, parents)
    return of_plan[key]


def _tree_plan(cu_seqlens: Tensor, parents: Tensor) -> PackPlan:
    return PackPlan(cu_seqlens.cpu().numpy(), parents=parents.cpu().numpy())


def _tree_sizes(tokens: int, documents: int, tiles: tuple[tuple[int, int], ...]) -> list[tuple[int, int]]:
    """Numbers of the lists of `tree_lists` and of their contexts, by shapes alone: a tile has one range a document."""
    counts = [tokens // rows + documents + 1 for rows, _ in tiles]
    return [(count * _COLUMNS, count + 1 + 5 * count * (documents + 1)) for count in counts]


@torch.library.custom_op("forge_triton::tree_lists", mutates_args=())
def tree_lists(cu_seqlens: Tensor, parents: Tensor, tokens: int, tiles: list[int], window: int) -> Tensor:
    """The lists of a pack with parents, each before its context, for a compiled graph; waits for the GPU.

    Args:
        tokens: rows of the pack.
        tiles: rows and columns of a tile, one list after the other.
        window: 0 for none.

    Returns:
        int32, as long as `_tree_sizes` says: the tiles behind the last one have no rows and no ranges.
    """
    pairs = tuple(zip(tiles[::2], tiles[1::2], strict=True))
    lists = _plan_lists(_tree_plan(cu_seqlens, parents), tokens, pairs, True, window or None)
    parts = []
    for (own, context), (size, context_size) in zip(lists, _tree_sizes(tokens, parents.shape[0], pairs), strict=True):
        assert context is not None  # there are parents
        count, more = len(own), size // _COLUMNS - len(own)
        places = context[: count + 1] + more
        padded = np.concatenate([own.reshape(-1), np.zeros(more * _COLUMNS, np.int32), places])
        parts += [padded, np.full(more, places[-1]), context[count + 1 :]]
        parts.append(np.zeros(context_size - context.size - more, np.int32))
    return torch.from_numpy(np.concatenate(parts)).to(cu_seqlens.device)


@tree_lists.register_fake
def _(cu_seqlens: Tensor, parents: Tensor, tokens: int, tiles: list[int], window: int) -> Tensor:
    pairs = tuple(zip(tiles[::2], tiles[1::2], strict=True))
    return cu_seqlens.new_empty(sum(map(sum, _tree_sizes(tokens, parents.shape[0], pairs))), dtype=torch.int32)


def check_plan(plan: PackPlan, cu_seqlens: Tensor, tokens: int) -> None:
    """Raises if a plan is not one of these cu_seqlens; on a GPU once for a plan, and without waiting for it.

    Raises:
        ValueError: the plan has more rows than the pack, or other documents than cu_seqlens.
    """
    of_plan = _uploaded.setdefault(plan, {})
    if (cu_seqlens.device, tokens) not in of_plan:
        of_plan[cu_seqlens.device, tokens] = _upload(plan, _plan_lists(plan, tokens, (), True, None), cu_seqlens)


def plan_lists(
    plan: PackPlan, tokens: int, tiles: tuple[tuple[int, int], ...], causal: bool, window: int | None
) -> list[np.ndarray]:
    """A plan's lists, made anew for these tile sizes, with tiles without columns for rows that belong to no document.

    Args:
        plan: its tile sizes, causality and window do not matter.
        tokens: rows of the pack.
        tiles: (rows, columns) of a tile, for each list; the last list owns keys, the others own queries.
        causal, window: as in packed_attention.

    Returns:
        For each of `tiles` int32 [tiles, 8], longest first.

    Raises:
        ValueError: the plan has more rows than the pack.
    """
    return [own for own, _ in _plan_lists(plan, tokens, tiles, causal, window)]


_List = tuple[np.ndarray, np.ndarray | None]  # tiles, context


def _plan_lists(
    plan: PackPlan, tokens: int, tiles: tuple[tuple[int, int], ...], causal: bool, window: int | None
) -> list[_List]:
    if plan.tokens > tokens:
        raise ValueError(f"plan: got one of {plan.tokens} tokens, expected at most {tokens}, the rows of q")
    made: dict[tuple[int, int, bool], _List] = {}
    lists = []
    for i, (rows, cols) in enumerate(tiles):
        kind = (rows, cols, i == len(tiles) - 1)
        if kind not in made:
            made[kind] = plan.tiles_and_context(
                rows, cols, causal=causal, window=window, backward=kind[2], tokens=tokens
            )
        lists.append(made[kind])
    return lists


def _upload(
    plan: PackPlan, lists: list[_List], cu_seqlens: Tensor, parents: Tensor | None = None
) -> tuple[Tensor, ...]:
    """One copy, from one pinned buffer, of cu_seqlens, parents, every list and every context."""
    if plan.cu_seqlens.size != cu_seqlens.numel():
        raise ValueError(
            f"plan: got one of {plan.cu_seqlens.size - 1} documents, expected {cu_seqlens.numel() - 1} as in cu_seqlens"
        )
    checked = [(plan.cu_seqlens, cu_seqlens, "cu_seqlens")]
    if plan.parents is not None and parents is not None:
        checked.append((plan.parents, parents, "parents"))
    contexts = [context for _, context in lists if context is not None]
    parts = [*(own for own, _, _ in checked), *(tiles.reshape(-1) for tiles, _ in lists), *contexts]
    buffer = torch.from_numpy(np.concatenate(parts))
    if cu_seqlens.device.type == "cuda":
        buffer = buffer.pin_memory().to(cu_seqlens.device, non_blocking=True)
    flat = buffer.split([part.size for part in parts])
    for expected, (_, given, name) in zip(flat, checked, strict=False):
        if given.device.type != "cpu":
            torch._assert_async((expected == given).all(), f"plan: expected one of {name}")
        elif not torch.equal(expected, given):
            raise ValueError(f"plan: got one of {name} {expected.tolist()}, expected {given.tolist()}")
    flat = flat[len(checked) :]
    return *(tiles.view(-1, _COLUMNS) for tiles in flat[: len(lists)]), *flat[len(lists) :]


def _require_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    ok = (cu_seqlens[0] == 0) & (cu_seqlens[-1] <= tokens) & (cu_seqlens.diff() >= 0).all()
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(ok, "cu_seqlens: expected offsets that start at 0, never decrease and end within q")
    elif not ok:
        raise ValueError(
            f"cu_seqlens: got {cu_seqlens.tolist()}, expected offsets that start at 0, never decrease and end at most "
            f"at {tokens}, the number of tokens"
        )


def device_list(
    cu_seqlens: Tensor, tokens: int, tile: tuple[int, int], causal: bool, window: int | None, backward: bool
) -> Tensor:
    """The list that `plan_lists` makes, from cu_seqlens on its device, without waiting for it.

    Its length depends on shapes alone, so that it can be part of a CUDA graph: `tokens // rows + documents + 1`, the
    last ones without rows. Offsets that fall or lie outside of the pack are clamped: nothing is read out of bounds.
    """
    rows, cols = tile
    zero = torch.zeros(1, dtype=torch.int64, device=cu_seqlens.device)
    ends = cu_seqlens.long().clamp(0, tokens).cummax(0).values
    # The rows past the last document are one more document, whose tiles have no columns.
    bounds = torch.cat([zero, ends[1:], zero + tokens])
    lengths = bounds.diff()
    documents = lengths.shape[0] - 1
    tiles_so_far = ((lengths + rows - 1) // rows).cumsum(0)
    index = torch.arange(tokens // rows + documents + 1, device=cu_seqlens.device)
    found = torch.searchsorted(tiles_so_far, index, right=True)
    document = found.clamp(max=documents)
    length, base = lengths[document], bounds[document]
    row = (index - torch.cat([zero, tiles_so_far])[document]) * rows
    row = torch.where(found <= documents, row, 0)
    end = torch.where(found <= documents, torch.minimum(row + rows, length), 0)
    reach = length if window is None else torch.full_like(length, window)

    def visible(i: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = (i - reach + 1).clamp(min=0), torch.minimum(length, i + reach)
        if not causal:
            return lower, upper
        return (i, upper) if backward else (lower, i + 1)

    first, last = visible(row), visible(end - 1)
    col_start, col_end = first[0] // cols * cols, last[1]
    full_start = (last[0] + cols - 1) // cols * cols
    inner = torch.minimum(first[1], last[1])
    full_end = torch.where(inner == length, inner, inner // cols * cols)
    any_full = full_start < full_end
    spans = (
        col_start,
        col_end,
        torch.where(any_full, full_start, col_start),
        torch.where(any_full, full_end, col_start),
    )
    seen = found < documents
    columns = [base + torch.where(seen, span, row) for span in spans]
    # Rows times columns stands for the area: it orders the tiles and nothing else.
    area = torch.where(seen, (end - row) * (col_end - col_start), 0).clamp(max=2**31 - 1)
    order = area.argsort(descending=True, stable=True)
    return torch.stack([document, base + row, base + end, *columns, area], 1).int()[order].contiguous()
