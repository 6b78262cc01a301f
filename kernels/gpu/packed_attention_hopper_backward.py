"""dK and dV of packed_attention for Hopper, in Gluon: as packed_attention_hopper.py, with rows and columns exchanged.

A tile owns 128 keys of one key/value head, 64 to each consumer, and loops over the packed queries of the whole group
that see them, 64 at a time, or 32 where registers ask for it: no sums across programs. Per block a consumer has four
products of 64 x 64 x D,

    S' = K Q^T     dP' = V dO^T     dV += P' dO     dK += dS' Q        P' = exp2(S' - lse), dS' = P' (dP' - delta)

with P' and dS' in registers, and dS' times its slope, 1 - tanh^2, under a soft cap. dP' runs while P' is computed, dV
while dS' is; the products of one consumer fill what the other one leaves. lse and delta of a block come by TMA too:
each thread wants 16 of them.

Floor, D 128, a block: 1024 cycles of tensor cores, 256 of the exponential unit, about 200 of other arithmetic.
Registers of a thread: 64 each for dK and dV, 32 each for S' and dP', 16 each for P' and dS' in bfloat16.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .attention_blocks import HOPPER_KEYS, HOPPER_QUERIES, padded_head_dim
from .attention_hopper_common import (
    advance,
    barriers,
    base2_logits,
    bounds,
    clear_rows,
    edge_blocks,
    edge_columns,
    load_item,
    load_places,
    load_range,
    nth_item,
    part,
    range_bounds,
    store_keys,
    visible,
)
from .attention_hopper_launch import PARTITIONS, described, readable, schedule
from .packed_attention import _factors, packed_attention_backward
from .packed_attention_hopper_dq import dq


@gluon.jit
def _fetch(matrix, at, vector, place, tile, numbers, ready, free, phase, BYTES: gl.constexpr):
    """Starts the copies of a block of rows and of a number for each row, once the readers of the slots have left."""
    mbarrier.wait(free, phase ^ 1)
    mbarrier.expect(ready, BYTES)
    tma.async_copy_global_to_shared(matrix, at, ready, tile)
    tma.async_copy_global_to_shared(vector, place, ready, numbers)


@gluon.jit
def _produce(
    q, dout, lse, delta, q_edge, dout_edge, lse_edge, delta_edge, k, v, tiles, context, tokens, items, programs, rounds,
    memory, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, COLS: gl.constexpr, EDGE: gl.constexpr, STAGES: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """The producer: every copy, in the order in which the consumers want them."""
    (
        k_slots, v_slots, q_ring, o_ring, lse_ring, delta_ring, kv_ready, kv_free, q_ready, q_free, o_ready, o_free,
    ) = memory  # fmt: skip
    KEYS: gl.constexpr = k.block_type.shape[0]
    WIDTH: gl.constexpr = k.block_type.shape[2]
    slot, phase, kv_phase = 0, 0, 0
    row = load_item(tiles, nth_item(0, programs), items, KV_HEADS)
    place, last = load_places(context, nth_item(0, programs), items, KV_HEADS, SHARED)
    for i in range(rounds):
        item = nth_item(i, programs)
        row_start, _row_end, col_start, full_start, full_end, col_end = bounds(row, COLS)
        row = load_item(tiles, nth_item(i + 1, programs), items, KV_HEADS)
        next_place, next_last = load_places(context, nth_item(i + 1, programs), items, KV_HEADS, SHARED)
        head = item % KV_HEADS
        if (item < items) & (col_start < col_end):
            for w in gl.static_range(2):
                mbarrier.wait(kv_free.index(w), kv_phase ^ 1)
                mbarrier.expect(kv_ready.index(w), KEYS * WIDTH * 4)
                key = row_start + w * KEYS
                tma.async_copy_global_to_shared(k, [key, head, 0], kv_ready.index(w), k_slots.index(w))
                tma.async_copy_global_to_shared(v, [key, head, 0], kv_ready.index(w), v_slots.index(w))
            kv_phase ^= 1
            for at_range in range(place, last, 5):
                if SHARED:
                    following = load_range(context, at_range, last)
                for e in range(edge_blocks(col_start, full_start, full_end, col_end, EDGE)):
                    col, _limit = edge_columns(e, col_start, full_start, full_end, col_end, EDGE)
                    EDGE_BYTES: gl.constexpr = EDGE * GROUP * (WIDTH * 2 + 4)
                    at, number = [col, head * GROUP, 0], [(head * tokens + col) * GROUP]
                    _fetch(
                        q_edge, at, lse_edge, number, part(q_ring.index(slot), q_edge, EDGE, WIDTH, GROUP),
                        _numbers(lse_ring.index(slot), lse_edge, EDGE * GROUP), q_ready.index(slot), q_free.index(slot),
                        phase, EDGE_BYTES,
                    )  # fmt: skip
                    _fetch(
                        dout_edge, at, delta_edge, number, part(o_ring.index(slot), q_edge, EDGE, WIDTH, GROUP),
                        _numbers(delta_ring.index(slot), lse_edge, EDGE * GROUP), o_ready.index(slot),
                        o_free.index(slot), phase, EDGE_BYTES,
                    )  # fmt: skip
                    slot, phase = advance(slot, phase, STAGES)
                for col in range(full_start, full_end, COLS):
                    BYTES: gl.constexpr = COLS * GROUP * (WIDTH * 2 + 4)
                    at, number = [col, head * GROUP, 0], [(head * tokens + col) * GROUP]
                    _fetch(
                        q, at, lse, number, q_ring.index(slot), lse_ring.index(slot), q_ready.index(slot),
                        q_free.index(slot), phase, BYTES,
                    )  # fmt: skip
                    _fetch(
                        dout, at, delta, number, o_ring.index(slot), delta_ring.index(slot), o_ready.index(slot),
                        o_free.index(slot), phase, BYTES,
                    )  # fmt: skip
                    slot, phase = advance(slot, phase, STAGES)
                if SHARED:
                    col_start, full_start, full_end, col_end, _gap = range_bounds(following, COLS)
        place, last = next_place, next_last


@gluon.jit
def _numbers(slot, source, ROWS: gl.constexpr):
    return slot._reinterpret(source.dtype, [ROWS], source.layout)


@gluon.jit
def _add_edge(
    q_tile, o_tile, lse, delta, k_tile, v_tile, dk, dv, key, query, limit, factor, cap, GROUP: gl.constexpr,
    CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr,
    LOGITS: gl.constexpr,
):  # fmt: skip
    """Adds half a block of queries, with a mask: it needs the registers of the other half."""
    KEYS: gl.constexpr = k_tile.shape[0]
    ROWS: gl.constexpr = q_tile.shape[0]
    WIDTH: gl.constexpr = q_tile.shape[1]
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    zeros = gl.zeros([KEYS, ROWS], gl.float32, LOGITS)
    if query + ROWS // GROUP > limit:
        clear_rows(q_tile, (limit - query) * GROUP, ROWS, WIDTH)
        clear_rows(o_tile, (limit - query) * GROUP, ROWS, WIDTH)
    s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dp = warpgroup_mma(v_tile, o_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    logits, tanh = base2_logits(s, factor, cap, SOFTCAP)
    p = gl.exp2(logits - lse.load(COLUMN)[None, :])
    token = query + gl.arange(0, ROWS, COLUMN) // GROUP
    seen = visible(token[None, :], key[:, None], 2147483647, WINDOW, CAUSAL, WINDOW > 0) & (token < limit)[None, :]
    # Of rows past the document q and dout are zeros here; lse and delta are another's, but finite.
    p = gl.where(seen, p, 0.0)
    p_operand = gl.convert_layout(p.to(DTYPE), OPERAND, assert_trivial=True)
    if SOFTCAP:
        p *= 1 - tanh * tanh
    dv = warpgroup_mma(p_operand, o_tile, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = p * (dp - delta.load(COLUMN)[None, :])
    if WINDOW == 1:
        # A query that sees its own key alone has probability 1 whatever the logit: no rounding may pass for a gradient.
        ds *= 0.0
    ds_operand = gl.convert_layout(ds.to(DTYPE), OPERAND, assert_trivial=True)
    dk = warpgroup_mma(ds_operand, q_tile, dk, is_async=True)
    dv, dk, p_operand, ds_operand = warpgroup_mma_wait(0, deps=(dv, dk, p_operand, ds_operand))
    return dk, dv


@gluon.jit
def _add_inner(
    k_tile, v_tile, dk, dv, slot, phase, memory, factor, cap, ROWS: gl.constexpr, WIDTH: gl.constexpr,
    SOFTCAP: gl.constexpr, OPERAND: gl.constexpr, DTYPE: gl.constexpr, LOGITS: gl.constexpr,
):  # fmt: skip
    """Adds a block of queries that all see every key."""
    _k, _v, q_ring, o_ring, lse_ring, delta_ring, _kr, _kf, q_ready, q_free, o_ready, o_free = memory
    COLUMN: gl.constexpr = gl.SliceLayout(0, LOGITS)
    q_tile = q_ring.index(slot).reshape([ROWS, WIDTH])
    o_tile = o_ring.index(slot).reshape([ROWS, WIDTH])
    KEYS: gl.constexpr = k_tile.shape[0]
    zeros = gl.zeros([KEYS, ROWS], gl.float32, LOGITS)
    mbarrier.wait(q_ready.index(slot), phase)
    s = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(o_ready.index(slot), phase)
    dp = warpgroup_mma(v_tile, o_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=(s,))
    logits, tanh = base2_logits(s, factor, cap, SOFTCAP)
    p = gl.exp2(logits - lse_ring.index(slot).load(COLUMN)[None, :])
    p_operand = gl.convert_layout(p.to(DTYPE), OPERAND, assert_trivial=True)
    if SOFTCAP:
        p *= 1 - tanh * tanh
    dv = warpgroup_mma(p_operand, o_tile, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = p * (dp - delta_ring.index(slot).load(COLUMN)[None, :])
    ds_operand = gl.convert_layout(ds.to(DTYPE), OPERAND, assert_trivial=True)
    dk = warpgroup_mma(ds_operand, q_tile, dk, is_async=True)
    dv, p_operand = warpgroup_mma_wait(1, deps=(dv, p_operand))
    mbarrier.arrive(o_free.index(slot))
    dk, ds_operand = warpgroup_mma_wait(0, deps=(dk, ds_operand))
    mbarrier.arrive(q_free.index(slot))
    return dk, dv


@gluon.jit
def _consume(
    W: gl.constexpr, k, q_edge, lse_edge, dk_out, dv_out, tiles, context, factor, cap, scale, items, programs,
    rounds, memory, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr,
    EDGE: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """A consumer: keys 64 W to 64 W + 63 of every tile."""
    (
        k_slots, v_slots, q_ring, o_ring, lse_ring, delta_ring, kv_ready, kv_free, q_ready, q_free, o_ready, o_free,
    ) = memory  # fmt: skip
    dtype: gl.constexpr = k.dtype
    KEYS: gl.constexpr = k.block_type.shape[0]
    WIDTH: gl.constexpr = k.block_type.shape[2]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS * GROUP, 16])
    MASKED: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EDGE * GROUP, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)

    slot, phase, kv_phase = 0, 0, 0
    row = load_item(tiles, nth_item(0, programs), items, KV_HEADS)
    place, last = load_places(context, nth_item(0, programs), items, KV_HEADS, SHARED)
    for i in range(rounds):
        item = nth_item(i, programs)
        row_start, row_end, col_start, full_start, full_end, col_end = bounds(row, COLS)
        row_start += W * KEYS
        dk = gl.zeros([KEYS, WIDTH], gl.float32, ACC)
        dv = gl.zeros([KEYS, WIDTH], gl.float32, ACC)
        if (item < items) & (col_start < col_end):
            key = row_start + gl.arange(0, KEYS, gl.SliceLayout(1, MASKED))
            k_tile = k_slots.index(W).reshape([KEYS, WIDTH])
            v_tile = v_slots.index(W).reshape([KEYS, WIDTH])
            mbarrier.wait(kv_ready.index(W), kv_phase)
            kv_phase ^= 1
            gap = 0
            for at_range in range(place, last, 5):
                if SHARED and WIDTH <= 64:
                    following = load_range(context, at_range, last)
                for e in range(edge_blocks(col_start, full_start, full_end, col_end, EDGE)):
                    col, limit = edge_columns(e, col_start, full_start, full_end, col_end, EDGE)
                    mbarrier.wait(q_ready.index(slot), phase)
                    mbarrier.wait(o_ready.index(slot), phase)
                    # Queries before the first key of this consumer see none of them.
                    if (not CAUSAL) or col + EDGE > row_start + gap:
                        dk, dv = _add_edge(
                            part(q_ring.index(slot), q_edge, EDGE, WIDTH, GROUP).reshape([EDGE * GROUP, WIDTH]),
                            part(o_ring.index(slot), q_edge, EDGE, WIDTH, GROUP).reshape([EDGE * GROUP, WIDTH]),
                            _numbers(lse_ring.index(slot), lse_edge, EDGE * GROUP),
                            _numbers(delta_ring.index(slot), lse_edge, EDGE * GROUP), k_tile, v_tile, dk, dv, key + gap,
                            col, limit, factor, cap, GROUP, CAUSAL, WINDOW, SOFTCAP, OPERAND, dtype, MASKED,
                        )  # fmt: skip
                    mbarrier.arrive(o_free.index(slot))
                    mbarrier.arrive(q_free.index(slot))
                    slot, phase = advance(slot, phase, STAGES)
                for col in range(full_start, full_end, COLS):  # noqa: B007
                    dk, dv = _add_inner(
                        k_tile, v_tile, dk, dv, slot, phase, memory, factor, cap, COLS * GROUP, WIDTH, SOFTCAP, OPERAND,
                        dtype, LOGITS,
                    )  # fmt: skip
                    slot, phase = advance(slot, phase, STAGES)
                if SHARED:
                    if WIDTH > 64:  # registers for it only now
                        following = load_range(context, at_range, last)
                    col_start, full_start, full_end, col_end, gap = range_bounds(following, COLS)
            mbarrier.arrive(kv_free.index(W))
        row = load_item(tiles, nth_item(i + 1, programs), items, KV_HEADS)
        place, last = load_places(context, nth_item(i + 1, programs), items, KV_HEADS, SHARED)
        if item < items:
            if SHARED:  # no register to keep it in
                row_end = gl.load(tiles + item // KV_HEADS * 8 + 2)
            head = item % KV_HEADS
            store_keys(dk * scale, dk_out, head, row_start, row_end, KV_HEADS, D, KEYS, WIDTH, dtype)
            store_keys(dv, dv_out, head, row_start, row_end, KV_HEADS, D, KEYS, WIDTH, dtype)


@gluon.jit(do_not_specialize=["tokens", "items", "programs", "rounds"])
def hopper_dkdv_kernel(
    q, dout, lse, delta, q_edge, dout_edge, lse_edge, delta_edge, k, v, dk, dv, tiles, context, factor, cap, scale,
    tokens, items, programs, rounds,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, COLS: gl.constexpr, EDGE: gl.constexpr,
    STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SHARED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dK and dV, as dkdv_kernel of packed_attention_backward.py. Queries come in COLS tokens, in edges EDGE."""
    WIDTH: gl.constexpr = k.block_type.shape[2]
    KEYS: gl.constexpr = k.block_type.shape[0]
    k_slots = gl.allocate_shared_memory(k.dtype, [2, KEYS, 1, WIDTH], k.layout)
    v_slots = gl.allocate_shared_memory(v.dtype, [2, KEYS, 1, WIDTH], v.layout)
    q_ring = gl.allocate_shared_memory(q.dtype, [STAGES, COLS, GROUP, WIDTH], q.layout)
    o_ring = gl.allocate_shared_memory(q.dtype, [STAGES, COLS, GROUP, WIDTH], dout.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [STAGES, COLS * GROUP], lse.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [STAGES, COLS * GROUP], delta.layout)
    memory = (
        k_slots, v_slots, q_ring, o_ring, lse_ring, delta_ring, barriers(2, 1), barriers(2, 1), barriers(STAGES, 1),
        barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), k, q_edge, lse_edge, dk, dv, tiles, context, factor, cap, scale, items, programs,
                rounds, memory, GROUP, KV_HEADS, D, COLS, EDGE, STAGES, CAUSAL, WINDOW, SOFTCAP, SHARED,
            )),
            (_consume, (
                gl.constexpr(1), k, q_edge, lse_edge, dk, dv, tiles, context, factor, cap, scale, items, programs,
                rounds, memory, GROUP, KV_HEADS, D, COLS, EDGE, STAGES, CAUSAL, WINDOW, SOFTCAP, SHARED,
            )),
            (_produce, (
                q, dout, lse, delta, q_edge, dout_edge, lse_edge, delta_edge, k, v, tiles, context, tokens, items,
                programs, rounds, memory, GROUP, KV_HEADS, COLS, EDGE, STAGES, SHARED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def packed_attention_hopper_backward(
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
    gluon_dq: bool,
    gluon_dkdv: bool,
    dq_context: Tensor | None = None,
    dkdv_context: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel of packed_attention_hopper_dq.py and the one above, each or Triton's: dq, dk, dv.

    dQ comes first: it leaves delta.
    """

    def first(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        return dq(dout, q, k, v, out, lse, dq_tiles, causal, window, softcap, scale, dq_context)

    def second(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        return dkdv(dout, q, k, v, lse, delta, dkdv_tiles, causal, window, softcap, scale, dkdv_context)

    return packed_attention_backward(
        dout, q, k, v, out, lse, dq_tiles, dkdv_tiles, causal, window, softcap, scale, dq_context, dkdv_context,
        other_dq=first if gluon_dq else None, other_dkdv=second if gluon_dkdv else None,
    )  # fmt: skip


STAGES = {64: 4, 128: 3}  # by padded head dimension


def dkdv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, tiles: Tensor,
    causal: bool, window: int, softcap: float, scale: float, context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel: dk, dv. `tiles` are those of `hopper_tile_sizes`; delta comes from the dQ kernel."""
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    tokens, kv_heads, d = k.shape
    group, width = q.shape[1] // kv_heads, max(64, padded_head_dim(d))
    q, k, v, dout = readable(q, k, v, dout)
    # A soft cap, or the addresses of ranges beside tokens of one head, take the registers of larger blocks.
    small = width > 64 and (softcap > 0 or (context is not None and group == 1))
    edge = HOPPER_QUERIES // group
    cols, stages = (edge, 2 * STAGES[width]) if small else (2 * edge, STAGES[width])
    items, programs, rounds = schedule(tiles, kv_heads)
    flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    queries = []
    for rows in (cols, edge):
        queries += [described(x, [rows, group, width]) for x in (q, dout)]
        queries += [TensorDescriptor.from_tensor(x.view(-1), [rows * group], flat) for x in (lse, delta)]
    hopper_dkdv_kernel[(programs,)](
        *queries, *(described(x, [HOPPER_KEYS // 2, 1, width]) for x in (k, v)),
        dk, dv, tiles, context, *_factors(softcap, scale), scale, tokens, items, programs, rounds,
        GROUP=group, KV_HEADS=kv_heads, D=d, COLS=cols, EDGE=edge, STAGES=stages, CAUSAL=causal,
        WINDOW=window, SOFTCAP=softcap > 0, SHARED=context is not None, **PARTITIONS,
    )  # fmt: skip
    return dk, dv
