"""Launchers of lora_linear's skinny kernels: tile sizes, how a pass is cut into programs, the sums of their parts."""

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
from torch import Tensor

from . import lora_linear_skinny as skinny
from .lora_linear_gemm import padded_rank, three
from .workload import multiprocessors

MAX_RANKS = 256  # sum of the padded ranks that one launch holds in registers
ONE_PASS_RANK = 32  # up to it the parts of dS and dB are less traffic than reading dY twice


def groups(ranks: list[int]) -> Iterator[tuple[slice, int]]:
    """Runs of at most three projections that one launch takes, with the column of s where each begins."""
    start = column = 0
    while start < len(ranks):
        stop = start + 1
        while stop < min(start + 3, len(ranks)) and sum(map(padded_rank, ranks[start : stop + 1])) <= MAX_RANKS:
            stop += 1
        yield slice(start, stop), column
        column += sum(ranks[start:stop])
        start = stop


def rounded(adapters: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The adapters, contiguous and in `dtype`; three float32 masters in one launch."""
    adapters = [a.contiguous() for a in adapters]
    masters = [i for i, a in enumerate(adapters) if a.dtype != dtype]
    for start in range(0, len(masters), 3):
        chunk = masters[start : start + 3]
        source, sizes = [adapters[i] for i in chunk], [adapters[i].numel() for i in chunk]
        for i in chunk:
            adapters[i] = torch.empty_like(adapters[i], dtype=dtype)
        grid = (triton.cdiv(max(sizes), 1024), len(chunk))
        skinny.cast_kernel[grid](
            *three(source), *three([adapters[i] for i in chunk]), *three(sizes), BLOCK=1024, num_warps=4
        )
    return adapters


def dropout_bits(
    p: float, seed: Tensor | None, projections: int, tokens: int, features: int, device: torch.device
) -> Tensor | None:
    """One bit an element of x and projection: int32 [projections, tokens, ceil(features / 32)]; None without a seed."""
    if seed is None:
        return None
    seed = seed.to(device)
    words = torch.empty(projections, tokens, triton.cdiv(features, 32), dtype=torch.int32, device=device)
    if words.numel() == 0:
        return words
    lowest_kept = min(round(p * 2**32), 2**32 - 1)
    aligned = features % 4 == 0
    block_m, block_w = (8, 16) if aligned else (32, 4)
    skinny.dropout_bits_kernel[(triton.cdiv(tokens, block_m), triton.cdiv(words.shape[2], block_w), projections)](
        words, seed, tokens, features, lowest_kept - 2**32 if lowest_kept >= 2**31 else lowest_kept,  # as int32
        BLOCK_M=block_m, WORDS=block_w, ALIGNED=aligned, num_warps=4,
    )  # fmt: skip
    return words


def shrink(
    x: Tensor,
    adapters: list[Tensor],
    scaling: Sequence[float],
    s: Tensor,
    words: Tensor | None,
    *,
    first: int = 0,
    transposed: bool = False,
) -> None:
    """s = [scaling_i * dropout_i(x) A_i^T], s [M, at least the sum of ranks]; with `transposed`, A_i^T are given.

    `first` is the index of the first projection in `words`.
    """
    ranks = [a.shape[1 if transposed else 0] for a in adapters]
    tokens, features = x.shape
    block_m, block_k = (64, _depth(ranks, words)) if x.element_size() == 2 else (32, 64)
    m_tiles, k_tiles = triton.cdiv(tokens, block_m), triton.cdiv(features, block_k)
    # Few row tiles: several programs share a row, at least four steps each.
    splits = max(1, min(multiprocessors(x.device) // m_tiles, k_tiles // 4))
    per_split = triton.cdiv(k_tiles, splits) * block_k
    splits = triton.cdiv(features, per_split)
    out = s if splits == 1 else s.new_empty((splits, tokens, sum(ranks)), dtype=torch.float32)
    skinny.shrink_kernel[(m_tiles, splits)](
        x, *three(adapters), out, s if words is None else words, tokens, features, *three(ranks), *three(list(scaling)),
        out.stride(-2), first, per_split, **_widths(ranks), BLOCK_M=block_m, BLOCK_K=block_k,
        DROPOUT=words is not None, TRANSPOSED=transposed, num_warps=_warps(ranks, words),
        num_stages=_stages(block_k, block_m, ranks, x),
    )  # fmt: skip
    if splits > 1:
        _sum_parts(out, [(splits, tokens, sum(ranks), s, s.stride(0), 1)])


def gather(
    s: Tensor,
    x: Tensor,
    outs: list[Tensor],
    factor: float,
    words: Tensor | None,
    *,
    first: int = 0,
    transposed: bool = False,
) -> None:
    """out_i [r_i, K] = factor * S_i^T dropout_i(x), or its transpose; S_i are column blocks of s, as in `shrink`."""
    ranks = [out.shape[1 if transposed else 0] for out in outs]
    tokens, features = x.shape
    block_m, block_k = (_depth(ranks, words), 64) if x.element_size() == 2 else (32, 64)
    column_panels = triton.cdiv(features, block_k)
    panels, rows = _row_panels(column_panels, tokens, block_m, sum(ranks), x)
    parts = x.new_empty(panels * sum(ranks) * features, dtype=torch.float32)
    skinny.shrink_backward_kernel[(column_panels, panels)](
        s, x, s if words is None else words, parts, tokens, features, *three(ranks), factor, s.stride(0), first, rows,
        **_widths(ranks), BLOCK_M=block_m, BLOCK_K=block_k, DROPOUT=words is not None, num_warps=_warps(ranks, words),
        num_stages=_stages(block_m, block_k, ranks, x),
    )  # fmt: skip
    strides = [(1, out.shape[1]) if transposed else (features, 1) for out in outs]
    _sum_parts(parts, [(panels, r, features, o, *stride) for r, o, stride in zip(ranks, outs, strides, strict=True)])


def expand_backward(
    dys: list[Tensor], s: Tensor, bs: list[Tensor], scaling: Sequence[float], ds: Tensor, dbs: list[Tensor]
) -> None:
    """dS_i = scaling_i * dY_i B_i into the columns of ds, and dB_i = dY_i^T S_i.

    Small ranks: one pass over dY. Large ones, whose parts would be more than dY: two.
    """
    ranks = [b.shape[1] for b in bs]
    width = max(map(padded_rank, ranks))
    if width > ONE_PASS_RANK:
        column = 0
        for dy, b, scale, db, rank in zip(dys, bs, scaling, dbs, ranks, strict=True):
            shrink(dy, [b], [scale], ds[:, column:], None, transposed=True)
            gather(s[:, column:], dy, [db], 1.0, None, transposed=True)
            column += rank
        return
    tokens, outs = s.shape[0], [dy.shape[1] for dy in dys]
    block_m, block_n = 32, 32 if s.element_size() != 2 else 512 if _shared(s.device) > 100 * 1024 else 256
    column_panels = [triton.cdiv(out, block_n) for out in outs]
    panels, rows = _row_panels(sum(column_panels), tokens, block_m, max(ranks), s)
    ds_size = sum(c * tokens * rank for c, rank in zip(column_panels, ranks, strict=True))
    ds_parts = s.new_empty(ds_size, dtype=torch.float32)
    db_parts = s.new_empty(panels * sum(b.numel() for b in bs), dtype=torch.float32)
    skinny.expand_backward_kernel[(sum(column_panels), panels)](
        *three(dys), *three(bs), s, ds_parts, db_parts, tokens, *(outs + [0] * (3 - len(outs))), *three(ranks),
        *three(list(scaling)), s.stride(0), rows, R=width, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=8, num_stages=3,
    )  # fmt: skip
    columns = [sum(ranks[:i]) for i in range(len(ranks))]
    _sum_parts(
        ds_parts,
        [(c, tokens, r, ds[:, at:], ds.stride(0), 1) for c, r, at in zip(column_panels, ranks, columns, strict=True)],
    )
    _sum_parts(db_parts, [(panels, n, r, db, r, 1) for n, r, db in zip(outs, ranks, dbs, strict=True)])


def _sum_parts(parts: Tensor, sums: list[tuple[int, int, int, Tensor, int, int]]) -> None:
    # sums: (number of parts, rows, columns, result, its strides) of each result, whose parts follow one another.
    counts, rows, columns, outs, row_strides, column_strides = (list(values) for values in zip(*sums, strict=True))
    sizes = [r * c for r, c in zip(rows, columns, strict=True)]
    offsets = [sum(n * size for n, size in zip(counts[:i], sizes, strict=False)) for i in range(len(sums))]
    block = 1024
    skinny.sum_parts_kernel[(triton.cdiv(max(sizes), block), len(sums))](
        parts, *three(outs), *three(offsets), *three(counts), *three(sizes), *three(columns), *three(row_strides),
        *three(column_strides), BLOCK=block, num_warps=4,
    )  # fmt: skip


def _widths(ranks: list[int]) -> dict[str, int]:
    r0, r1, r2 = map(padded_rank, three(ranks))
    return {"GROUP": len(ranks), "R0": r0, "R1": r1, "R2": r2}


def _warps(ranks: list[int], words: Tensor | None) -> int:
    return 4 if words is None and sum(map(padded_rank, ranks)) <= 128 else 8


def _depth(ranks: list[int], words: Tensor | None) -> int:
    # Length of one step of a skinny product; what does not spill on sm_80, where operands go through registers.
    if sum(map(padded_rank, ranks)) <= 128:
        return 128
    return 64 if words is None else 32


def _stages(depth: int, width: int, ranks: list[int], x: Tensor) -> int:
    # Tiles in flight, depth x (width + ranks) each: four, where that leaves some of the shared memory.
    return max(2, min(4, _shared(x.device) // (depth * (width + sum(map(padded_rank, ranks))) * x.element_size())))


@functools.cache
def _shared(device: torch.device) -> int:
    # Bytes for tiles in flight: those of an A100 at most, for which the kernels are compiled ahead of time; GPUs for
    # workstations have 99 KiB a program.
    if device.type != "cuda":
        return 140 * 1024
    properties = torch.cuda.get_device_properties(device)
    # The attribute is missing from torch's type stubs.
    return min(140 * 1024, getattr(properties, "shared_memory_per_block_optin", 99 * 1024) - 23 * 1024)


def _row_panels(column_panels: int, rows: int, block: int, rank: int, like: Tensor) -> tuple[int, int]:
    """How many row panels a pass is cut into, and rows of each: full waves of programs against traffic of their parts.

    A panel more fills the last wave better, and costs a float32 part to write and read: 4 * rank / rows of the pass.
    """
    sms, best = multiprocessors(like.device), (float("inf"), 1)
    for panels in range(1, min(32, triton.cdiv(rows, block)) + 1):
        waves = column_panels * panels / sms
        best = min(best, (-(-waves // 1) / waves + panels * 4 * rank / rows, panels))
    size = triton.cdiv(triton.cdiv(rows, best[1]), block) * block
    return triton.cdiv(rows, size), size
