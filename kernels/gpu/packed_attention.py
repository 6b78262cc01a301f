"""packed_attention in Triton: forward, dQ, and dK with dV, each one program per (tile, key/value head).

A tile is one row of a PackPlan list (kernels/pack.py): a range of rows that one program owns and the range of columns
that it loops over, split into columns that every row sees (no mask, no bounds) and the edges around them. Tiles come
longest first, and a GPU starts programs in order, so the list is the schedule.

Queries are packed: row r of a tile of queries is token `r // GROUP`, head `r % GROUP` of the GROUP query heads that
share a key/value head. Keys and values are then read once for the whole group, and a group of any size fills a tile.

Logits are kept in base 2: `factor` holds `scale * log2(e)`, so that the exponential is the instruction exp2. With a
soft cap `factor` is `scale / softcap` and `cap` is `softcap * log2(e)`.

dQ runs before dK/dV and leaves `delta` for it. Nothing is accumulated across programs: results repeat bit for bit.

    q, out, dout, dq   [tokens, kv_heads * GROUP, D]     strides of tokens and heads given, D contiguous
    k, v, dk, dv       [tokens, kv_heads, D]
    lse, delta         [kv_heads, tokens * GROUP] float32: log2 of the sum of exponentials, sum(dout * out) of a row
    tiles              int32 [programs / kv_heads, 8]
    context            int32, where documents continue others (SHARED): the ranges of columns of each tile

With float32 inputs (FLOAT32) gradients are to be as exact as plain torch's: lse has a second such array with what the
first lost to rounding, and delta is the sum of P dP over keys.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .attention_blocks import (
    Blocks,
    Kernels,
    alternatives,
    architecture,
    configured,
    kernels,
    padded_head_dim,
    tile_sizes,
)
from .packed_attention_backward import dkdv_kernel, dq_kernel
from .packed_attention_forward import forward_kernel
from .workload import Workload, meta


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    forward_tiles: Tensor,
    dq_tiles: Tensor,
    dkdv_tiles: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    forward_context: Tensor | None = None,
    dq_context: Tensor | None = None,
    dkdv_context: Tensor | None = None,
    blocks: Sequence[int] = (0, 0, 0),
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: out, lse. `blocks`: which of its configurations each kernel has."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (_readable(x, q.shape[1] // k.shape[1]) for x in (q, k, v))
    tokens, kv_heads, d = k.shape
    rows = tokens * (q.shape[1] // kv_heads)
    lse = torch.empty((_lse_parts(q.dtype), kv_heads, rows), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    table = kernels(q.device, q.dtype, d)
    sizes = _chosen(table, "forward", blocks[0], k, v)
    if table.forward_shared and forward_context is not None:
        sizes = table.forward_shared
    descriptors = _key_descriptors(k, v, sizes.block_n)
    forward_kernel[forward_tiles.shape[0] * kv_heads,](
        q, k, v, out, lse, *descriptors, forward_tiles, forward_context, *_factors(softcap, scale), window, tokens,
        kv_heads, *_strides(q, k, v, out), **_constants(q, k, causal, window, softcap), **_sizes(sizes),
        EDGE_N=sizes.edge_n, SHARED=forward_context is not None, TMA=descriptors[0] is not None,
    )  # fmt: skip
    return out, lse


def packed_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dq_tiles: Tensor,
    dkdv_tiles: Tensor,
    causal: bool,
    window: int,
    softcap: float,
    scale: float,
    dq_context: Tensor | None = None,
    dkdv_context: Tensor | None = None,
    blocks: Sequence[int] = (0, 0, 0),
    *,
    other_dq: Callable[..., tuple[Tensor, Tensor]] | None = None,
    other_dkdv: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the two backward kernels: dq, dk, dv.

    `other_dq(dout, q, k, v, out, lse)` replaces the first, which leaves dq and delta, and `other_dkdv(dout, q, k, v,
    lse, delta)` the second.
    """
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    q, k, v, out, dout = (_readable(x, q.shape[1] // k.shape[1]) for x in (q, k, v, out, dout))
    tokens, kv_heads, d = k.shape
    if tokens == 0:
        return dq, dk, dv
    delta = torch.empty(lse.shape[1:], dtype=torch.float32, device=q.device)
    table = kernels(q.device, q.dtype, d)
    constants = _constants(q, k, causal, window, softcap)
    scalars = (*_factors(softcap, scale), scale, window, tokens, kv_heads)

    if other_dq is not None:
        dq, delta = other_dq(dout, q, k, v, out, lse)
    else:
        sizes = _chosen(table, "dq", blocks[1], k, v)
        descriptors = _key_descriptors(k, v, sizes.block_n)
        dq_kernel[dq_tiles.shape[0] * kv_heads,](
            q, k, v, out, dout, lse, dq, delta, *descriptors, dq_tiles, dq_context, *scalars,
            *_strides(q, k, v, out, dout), **constants, **_sizes(sizes), EDGE_N=sizes.edge_n,
            SHARED=dq_context is not None, TMA=descriptors[0] is not None,
        )  # fmt: skip

    if other_dkdv is not None:
        return dq, *other_dkdv(dout, q, k, v, lse, delta)
    sizes = _chosen(table, "dkdv", blocks[2], q, dout)
    group = q.shape[1] // kv_heads
    descriptors = _query_descriptors(q, dout, sizes.block_m, group)
    # What the call wants registers for: most, if addresses of rows, or of a range of columns.
    crowding = 1 if softcap > 0 or group < 4 or (window > 0 and not causal) else 0
    if descriptors[0] is None or dkdv_context is not None:
        crowding = 2
    if sizes is table.dkdv and table.dkdv_tight and crowding >= table.tight_from:
        sizes = table.dkdv_tight
        descriptors = _query_descriptors(q, dout, sizes.block_m, group)
    dkdv_kernel[dkdv_tiles.shape[0] * kv_heads,](
        q, k, v, dout, lse, delta, dk, dv, *descriptors, dkdv_tiles, dkdv_context, *scalars, *_strides(q, k, v, dout),
        **constants, **_sizes(sizes), EDGE_STAGES=sizes.edge_stages, SHARED=dkdv_context is not None,
        TMA=descriptors[0] is not None,
    )  # fmt: skip
    return dq, dk, dv


def _chosen(table: Kernels, kernel: str, index: int, *tensors: Tensor) -> Blocks:
    # Compiled ahead of time with bulk copies where there are any: loads by pointers take more registers.
    bulk = architecture(tensors[0].device) < 90 or _bulk_copies(*tensors)
    return table.ways(kernel)[index if bulk else 0]


def _readable(x: Tensor, group: int) -> Tensor:
    # The kernels want rows without gaps, and 32 bits for offsets between the heads of a group.
    return x if x.stride(2) == 1 and x.stride(1) * group < 2**31 else x.contiguous()


def _lse_parts(dtype: torch.dtype) -> int:
    return 2 if dtype == torch.float32 else 1


def _factors(softcap: float, scale: float) -> tuple[float, float]:
    log2_e = math.log2(math.e)
    return (scale / softcap, softcap * log2_e) if softcap else (scale * log2_e, 0.0)


def _constants(q: Tensor, k: Tensor, causal: bool, window: int, softcap: float) -> dict[str, Any]:
    return {
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[2],
        "BLOCK_D": padded_head_dim(q.shape[2]),
        "CAUSAL": causal,
        "WINDOWED": window > 0,
        "SOFTCAP": softcap > 0,
        "FLOAT32": _lse_parts(q.dtype) == 2,
        # How sm_90 wants its loops; the interpreter runs them like that too.
        "WGMMA": q.dtype != torch.float32 and architecture(q.device) in (0, 90),
    }


def _sizes(blocks: Blocks) -> dict[str, int | None]:
    return {
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "maxnreg": blocks.registers,
    }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _key_descriptors(k: Tensor, v: Tensor, block_n: int) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """For the tensor memory accelerator, where there is one and it can read k and v: blocks of keys of one head."""
    if not _bulk_copies(k, v):
        return None, None
    block = [block_n, 1, padded_head_dim(k.shape[2])]
    return _descriptor(k, block), _descriptor(v, block)


def _query_descriptors(
    q: Tensor, dout: Tensor, block_m: int, group: int
) -> tuple[TensorDescriptor | None, TensorDescriptor | None]:
    """Likewise: blocks of tokens with the heads of a group, when whole tokens fill a block."""
    if block_m % group or not _bulk_copies(q, dout):
        return None, None
    block = [block_m // group, group, padded_head_dim(q.shape[2])]
    return _descriptor(q, block), _descriptor(dout, block)


def _descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)


def _bulk_copies(*tensors: Tensor) -> bool:
    # Descriptors need addresses and strides of 16 bytes; Hopper and later have the unit, the interpreter plays it.
    device = tensors[0].device
    if tensors[0].dtype == torch.float32 or (device.type != "cpu" and architecture(device) < 90):
        return False
    return all(
        x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
        for x in tensors
    )


def workloads() -> list[Workload]:
    """An 8k pack of documents up to 2k (mean context 470): every head dimension, the options that cost registers, and
    the configurations to choose from ("blocks 1" is the second one).

    The programs of the grid are those of documents of 512 tokens.
    """
    listed = []
    hopper = ("forward_kernel", "dq_kernel", "dkdv_kernel")
    calls = [
        ("D 128", 32, 8, 128, True, 0, 0.0), ("D 64", 32, 8, 64, True, 0, 0.0), ("D 96", 32, 8, 96, True, 0, 0.0),
        ("D 256, window, softcap", 16, 8, 256, True, 512, 50.0), ("D 80", 32, 32, 80, True, 0, 0.0),
        ("D 128, both directions, window", 32, 32, 128, False, 512, 0.0),
        ("D 128, window, softcap, 7 heads a group", 28, 4, 128, True, 512, 50.0),
        ("D 128, shared prompts", 32, 8, 128, True, 0, 0.0), ("D 128, shared prompts", 8, 8, 128, True, 0, 0.0),
        ("D 64, shared prompts, window", 32, 8, 64, True, 512, 0.0),
    ]  # fmt: skip
    for name, q_heads, kv_heads, d, causal, window, softcap in calls:
        listed += _calls(name, q_heads, kv_heads, d, causal, window, softcap, torch.bfloat16, hopper)
    listed += _calls("float32, D 64", 8, 1, 64, True, 0, 0.0, torch.float32, ())
    for d in (128, 64):
        for place in (1, 2):
            listed += _calls(f"D {d}, blocks {place}", 32, 8, d, True, 0, 0.0, torch.bfloat16, hopper, place)
    from .attention_hopper_workloads import workloads as gluon  # an experimental part of Triton

    return listed + gluon()


def _calls(
    name: str, q_heads: int, kv_heads: int, d: int, causal: bool, window: int, softcap: float, dtype: torch.dtype,
    wgmma: tuple[str, ...], place: int = 0,
) -> list[Workload]:  # fmt: skip
    """The calls of one size, with the configuration at `place` of each kernel where it has so many, on the
    architectures where one does. `wgmma` names the forward kernel and the two backward ones, or nothing.
    """
    tokens, group = 8192, q_heads // kv_heads
    q, kv = meta(tokens, q_heads, d, dtype=dtype), meta(tokens, kv_heads, d, dtype=dtype)
    lse = meta(_lse_parts(dtype), kv_heads, tokens * group, dtype=torch.float32)
    options = (causal, window, softcap, d**-0.5)
    # Eight candidates of 256 tokens after a prompt of 1024 have as many pairs a token as the documents of 512.
    ranges = meta(4096, dtype=torch.int32) if "shared" in name else None
    context = (ranges, ranges, ranges)

    def tiles(index: int) -> Tensor:
        return meta(16 * math.ceil(512 / tile_sizes(q, kv)[index][0]), 8, dtype=torch.int32)

    def blocks() -> list[int]:
        return [min(place, len(names) - 1) for names in alternatives(q, kv, causal, softcap, ranges is not None)]

    def having(*names: str) -> tuple[int, ...]:
        tables = {arch: configured(arch, dtype, d) for arch in Workload.architectures}
        return tuple(a for a, table in tables.items() if any(len(table.ways(name)) > place for name in names))

    flops = round(4 * d * q_heads * tokens * (470 if causal else 940))
    size, small = tokens * q_heads * d * q.element_size(), tokens * kv_heads * d * q.element_size()
    forward, backward = wgmma[:1], wgmma[1:]
    listed = [
        Workload(
            f"packed_attention: forward {name}, {q_heads}/{kv_heads} heads",
            lambda: packed_attention(q, kv, kv, tiles(0), tiles(1), tiles(2), *options, *context, blocks=blocks()),
            2 * size + 2 * small, flops, forward, having("forward"), forward,
        ),
        Workload(
            f"packed_attention: backward {name}, {q_heads}/{kv_heads} heads",
            lambda: packed_attention_backward(
                q, q, kv, kv, q, lse, tiles(1), tiles(2), *options, *context[1:], blocks=blocks()
            ),
            4 * size + 4 * small, flops * 5 // 2, backward, having("dq", "dkdv"), backward,
        ),
    ]  # fmt: skip
    return [workload for workload in listed if workload.architectures]
