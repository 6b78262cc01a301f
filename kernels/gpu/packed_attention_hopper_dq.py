"""dQ of packed_attention for Hopper, in Gluon, and delta: as packed_attention_hopper.py, with three products a block.

A tile holds 128 packed query rows, 64 to each consumer, and loops over the keys that they see, 64 at a time:

    S = Q K^T     dP = dO V^T     dQ += dS K        P = exp2(S - lse), dS = P (dP - delta)

with P and dS in registers, P times the slope of a soft cap, 1 - tanh^2, where there is one. In the interior S and dP of
the next block are started before dQ of this one, so that P is computed while dP runs and dS while dQ runs:

    tensor cores   | S1 | dP1 | dQ0 | S2 | dP2 | dQ1 | ...        consumer 0; consumer 1 fills what is left
    the rest       | -  | P1  | dS1 | -  | P2  | dS2 | ...

A tile begins with delta = sum(dO * O) of its rows. O is read once, so it has no slots of its own: its rows come as a
first block, those of consumer 0 in the ring of keys, those of consumer 1 in the ring of values.

Floor, D 128, a block of 64 x 64: 768 cycles of tensor cores, 256 of the exponential unit, about 170 of other
arithmetic. Registers of a thread: 64 for dQ, 32 each for S and dP, 16 for dS in bfloat16. Shared memory at D 128: 128
KiB for queries and dO of two tiles, 48 for three blocks of keys (one is kept for dQ), 32 for two of values.
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

from .attention_blocks import HOPPER_DQ_KEYS, HOPPER_ROWS, padded_group, padded_head_dim
from .attention_hopper_common import (
    advance,
    barriers,
    base2_logits,
    bounds,
    clear_rows,
    edge_blocks,
    edge_columns,
    fetch,
    in_order,
    load_item,
    load_places,
    load_range,
    nth_item,
    part,
    range_bounds,
    row_layout,
    start_product,
    store_queries,
    visible,
    wide,
)
from .attention_hopper_launch import PARTITIONS, described, readable, schedule
from .packed_attention import _factors

Q_STAGES, K_STAGES, V_STAGES = 2, 3, 2


@gluon.jit
def _produce(
    q, dout, out, k, v, tiles, context, items, programs, rounds, memory,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """The producer: every copy, in the order in which the consumers want them."""
    q_slots, o_slots, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free = memory
    TOKENS: gl.constexpr = q.block_type.shape[0]
    PADDED: gl.constexpr = q.block_type.shape[1]
    WIDTH: gl.constexpr = q.block_type.shape[2]
    BLOCK: gl.constexpr = k.block_type.shape[0]
    Q_BYTES: gl.constexpr = TOKENS * PADDED * WIDTH * 2
    BYTES: gl.constexpr = BLOCK * WIDTH * 2
    q_slot, q_phase, k_slot, k_phase, v_slot, v_phase = 0, 0, 0, 0, 0, 0
    row = load_item(tiles, nth_item(0, programs), items, KV_HEADS)
    place, last = load_places(context, nth_item(0, programs), items, KV_HEADS, SHARED)
    for i in range(rounds):
        item = nth_item(i, programs)
        row_start, _row_end, col_start, full_start, full_end, col_end = bounds(row, BLOCK)
        row = load_item(tiles, nth_item(i + 1, programs), items, KV_HEADS)
        next_place, next_last = load_places(context, nth_item(i + 1, programs), items, KV_HEADS, SHARED)
        head = item % KV_HEADS
        if (item < items) & (col_start < col_end):
            for w in gl.static_range(2):
                both = w * Q_STAGES + q_slot
                at = [row_start + w * TOKENS, head * GROUP, 0]
                mbarrier.wait(q_free.index(both), q_phase ^ 1)
                mbarrier.expect(q_ready.index(both), 2 * Q_BYTES)
                tma.async_copy_global_to_shared(q, at, q_ready.index(both), q_slots.index(both))
                tma.async_copy_global_to_shared(dout, at, q_ready.index(both), o_slots.index(both))
            q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
            fetch(
                out, [row_start, head * GROUP, 0], part(k_ring.index(k_slot), out, TOKENS, WIDTH, PADDED),
                k_ready.index(k_slot), k_free.index(k_slot), k_phase, Q_BYTES,
            )  # fmt: skip
            fetch(
                out, [row_start + TOKENS, head * GROUP, 0], part(v_ring.index(v_slot), out, TOKENS, WIDTH, PADDED),
                v_ready.index(v_slot), v_free.index(v_slot), v_phase, Q_BYTES,
            )  # fmt: skip
            k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
            v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
            for at_range in range(place, last, 5):
                if SHARED:
                    following = load_range(context, at_range, last)
                edges = edge_blocks(col_start, full_start, full_end, col_end, BLOCK)
                for b in range(edges + (full_end - full_start) // BLOCK):
                    col, _limit = edge_columns(b, col_start, full_start, full_end, col_end, BLOCK)
                    if b >= edges:
                        col = full_start + (b - edges) * BLOCK
                    at = [col, head, 0]
                    fetch(k, at, k_ring.index(k_slot), k_ready.index(k_slot), k_free.index(k_slot), k_phase, BYTES)
                    fetch(v, at, v_ring.index(v_slot), v_ready.index(v_slot), v_free.index(v_slot), v_phase, BYTES)
                    k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
                    v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
                if SHARED:
                    col_start, full_start, full_end, col_end, _gap = range_bounds(following, BLOCK)
        place, last = next_place, next_last


@gluon.jit
def _row_sums(a_tile, b_tile, ROWS: gl.constexpr, WIDTH: gl.constexpr, ROW: gl.constexpr):
    """sum(a * b) of each row."""
    COPY: gl.constexpr = row_layout(ROWS, WIDTH)
    product = a_tile.load(COPY).to(gl.float32) * b_tile.load(COPY).to(gl.float32)
    return gl.convert_layout(gl.sum(product, 1), ROW, assert_trivial=True)


@gluon.jit
def _slopes(s, lse, factor, cap, SOFTCAP: gl.constexpr):
    """What dP - delta is multiplied with: P, times the slope of a soft cap."""
    logits, tanh = base2_logits(s, factor, cap, SOFTCAP)
    p = gl.exp2(logits - lse[:, None])
    if SOFTCAP:
        p *= 1 - tanh * tanh
    return p


@gluon.jit
def _consume(
    W: gl.constexpr, q, k, out, lse, dq, delta, tiles, context, factor, cap, scale, tokens, items, programs,
    rounds, stride_qt, memory, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr,
    SHARED: gl.constexpr,
):  # fmt: skip
    """A consumer: rows 64 W to 64 W + 63 of every tile."""
    q_slots, o_slots, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free = memory
    dtype: gl.constexpr = q.dtype
    TOKENS: gl.constexpr = q.block_type.shape[0]
    PADDED: gl.constexpr = q.block_type.shape[1]
    WIDTH: gl.constexpr = q.block_type.shape[2]
    ROWS: gl.constexpr = TOKENS * PADDED
    BLOCK: gl.constexpr = k.block_type.shape[0]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)

    q_slot, q_phase, k_slot, k_phase, v_slot, v_phase = 0, 0, 0, 0, 0, 0
    row = load_item(tiles, nth_item(0, programs), items, KV_HEADS)
    place, last = load_places(context, nth_item(0, programs), items, KV_HEADS, SHARED)
    for i in range(rounds):
        item = nth_item(i, programs)
        row_start, row_end, col_start, full_start, full_end, col_end = bounds(row, BLOCK)
        row_start += W * TOKENS
        head = item % KV_HEADS
        packed = gl.arange(0, ROWS, ROW)
        query = row_start + packed // PADDED
        # Rows past the tile, and those of no head: they read and write nothing.
        own = (query < row_end) & (packed % PADDED < GROUP) & (item < items)
        local = packed // PADDED * GROUP + packed % PADDED
        first = (wide(head) * wide(tokens) + row_start) * GROUP
        acc = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
        sums = gl.zeros([ROWS], gl.float32, ROW)
        if (item < items) & (col_start < col_end):
            high = gl.load(lse + first + local, mask=own, other=0.0)
            at = W * Q_STAGES + q_slot
            q_tile = q_slots.index(at).reshape([ROWS, WIDTH])
            o_tile = o_slots.index(at).reshape([ROWS, WIDTH])
            mbarrier.wait(q_ready.index(at), q_phase)
            mbarrier.wait(k_ready.index(k_slot), k_phase)
            mbarrier.wait(v_ready.index(v_slot), v_phase)
            out_slot = part(k_ring.index(k_slot) if W == 0 else v_ring.index(v_slot), out, TOKENS, WIDTH, PADDED)
            sums = _row_sums(o_tile, out_slot.reshape([ROWS, WIDTH]), ROWS, WIDTH, ROW)
            mbarrier.arrive(k_free.index(k_slot))
            mbarrier.arrive(v_free.index(v_slot))
            k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
            v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)

            gap = 0
            for at_range in range(place, last, 5):
                if SHARED:
                    following_range = load_range(context, at_range, last)
                for e in range(edge_blocks(col_start, full_start, full_end, col_end, BLOCK)):
                    col, limit = edge_columns(e, col_start, full_start, full_end, col_end, BLOCK)
                    mbarrier.wait(k_ready.index(k_slot), k_phase)
                    mbarrier.wait(v_ready.index(v_slot), v_phase)
                    # Keys after the last row of this consumer are seen by none.
                    if (not CAUSAL) or col + gap < row_start + TOKENS:
                        k_tile = k_ring.index(k_slot).reshape([BLOCK, WIDTH])
                        if col + BLOCK > limit:
                            clear_rows(k_tile, limit - col, BLOCK, WIDTH)
                        s = start_product(q_tile, k_tile, ROWS, BLOCK, LOGITS)
                        dp = start_product(o_tile, v_ring.index(v_slot).reshape([BLOCK, WIDTH]), ROWS, BLOCK, LOGITS)
                        s = warpgroup_mma_wait(1, deps=(s,))
                        p = _slopes(s, high, factor, cap, SOFTCAP)
                        in_order(q_ready.index(at), q_phase)
                        dp = warpgroup_mma_wait(0, deps=(dp,))
                        key = col + gl.arange(0, BLOCK, gl.SliceLayout(0, LOGITS))
                        seen = visible(query[:, None] - gap, key[None, :], limit, WINDOW, CAUSAL, WINDOW > 0)
                        # Not P alone: of keys past the edge dP may be NaN.
                        ds = gl.where(seen, p * (dp - sums[:, None]), 0.0)
                        if WINDOW == 1:
                            # A query that sees its own key alone has probability 1 whatever the logit: no rounding may
                            # pass for a gradient.
                            ds *= 0.0
                        ds_operand = gl.convert_layout(ds.to(dtype), OPERAND, assert_trivial=True)
                        acc = warpgroup_mma(ds_operand, k_tile, acc, is_async=True)
                        acc, ds_operand = warpgroup_mma_wait(0, deps=(acc, ds_operand))
                    mbarrier.arrive(v_free.index(v_slot))
                    mbarrier.arrive(k_free.index(k_slot))
                    k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
                    v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)

                if full_start < full_end:
                    mbarrier.wait(k_ready.index(k_slot), k_phase)
                    s = start_product(q_tile, k_ring.index(k_slot).reshape([BLOCK, WIDTH]), ROWS, BLOCK, LOGITS)
                    mbarrier.wait(v_ready.index(v_slot), v_phase)
                    dp = start_product(o_tile, v_ring.index(v_slot).reshape([BLOCK, WIDTH]), ROWS, BLOCK, LOGITS)
                    s = warpgroup_mma_wait(1, deps=(s,))
                    p = _slopes(s, high, factor, cap, SOFTCAP)
                    dp = warpgroup_mma_wait(0, deps=(dp,))
                    mbarrier.arrive(v_free.index(v_slot))
                    ds = p * (dp - sums[:, None])
                    ds_operand = gl.convert_layout(ds.to(dtype), OPERAND, assert_trivial=True)
                    for col in range(full_start + BLOCK, full_end, BLOCK):  # noqa: B007
                        next_slot, next_phase = advance(k_slot, k_phase, K_STAGES)
                        v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
                        mbarrier.wait(k_ready.index(next_slot), next_phase)
                        s = start_product(q_tile, k_ring.index(next_slot).reshape([BLOCK, WIDTH]), ROWS, BLOCK, LOGITS)
                        mbarrier.wait(v_ready.index(v_slot), v_phase)
                        dp = start_product(o_tile, v_ring.index(v_slot).reshape([BLOCK, WIDTH]), ROWS, BLOCK, LOGITS)
                        k_tile = k_ring.index(k_slot).reshape([BLOCK, WIDTH])
                        acc = warpgroup_mma(ds_operand, k_tile, acc, is_async=True)
                        s = warpgroup_mma_wait(2, deps=(s,))
                        p = _slopes(s, high, factor, cap, SOFTCAP)
                        in_order(q_ready.index(at), q_phase)
                        dp = warpgroup_mma_wait(1, deps=(dp,))
                        mbarrier.arrive(v_free.index(v_slot))
                        following = (p * (dp - sums[:, None])).to(dtype)
                        in_order(q_ready.index(at), q_phase)
                        acc, ds_operand = warpgroup_mma_wait(0, deps=(acc, ds_operand))
                        mbarrier.arrive(k_free.index(k_slot))
                        ds_operand = gl.convert_layout(following, OPERAND, assert_trivial=True)
                        k_slot = next_slot
                        k_phase = next_phase
                    acc = warpgroup_mma(ds_operand, k_ring.index(k_slot).reshape([BLOCK, WIDTH]), acc, is_async=True)
                    acc, ds_operand = warpgroup_mma_wait(0, deps=(acc, ds_operand))
                    mbarrier.arrive(k_free.index(k_slot))
                    k_slot, k_phase = advance(k_slot, k_phase, K_STAGES)
                    v_slot, v_phase = advance(v_slot, v_phase, V_STAGES)
                if SHARED:
                    col_start, full_start, full_end, col_end, gap = range_bounds(following_range, BLOCK)
            mbarrier.arrive(q_free.index(at))
            q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
        row = load_item(tiles, nth_item(i + 1, programs), items, KV_HEADS)
        place, last = load_places(context, nth_item(i + 1, programs), items, KV_HEADS, SHARED)
        # Rows of no document get zeros: the next kernel multiplies with their delta.
        gl.store(delta + first + local, sums, mask=own)
        if item < items:
            store_queries(acc * scale, dq, head, row_start, row_end, stride_qt, D, GROUP, PADDED, D, ROWS, WIDTH, dtype)


@gluon.jit(do_not_specialize=["tokens", "items", "programs", "rounds"])
def hopper_dq_kernel(
    q, dout, out, k, v, lse, dq, delta, tiles, context, factor, cap, scale, tokens, items, programs, rounds, stride_qt,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, Q_STAGES: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOW: gl.constexpr, SOFTCAP: gl.constexpr, SHARED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """dQ, and delta for the dK/dV kernel, as dq_kernel of packed_attention_backward.py. dq is contiguous."""
    Q_SHAPE: gl.constexpr = q.block_type.shape
    BLOCK: gl.constexpr = k.block_type.shape[0]
    q_slots = gl.allocate_shared_memory(q.dtype, [2 * Q_STAGES, Q_SHAPE[0], Q_SHAPE[1], Q_SHAPE[2]], q.layout)
    o_slots = gl.allocate_shared_memory(q.dtype, [2 * Q_STAGES, Q_SHAPE[0], Q_SHAPE[1], Q_SHAPE[2]], dout.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [K_STAGES, BLOCK, 1, Q_SHAPE[2]], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [V_STAGES, BLOCK, 1, Q_SHAPE[2]], v.layout)
    memory = (
        q_slots, o_slots, k_ring, v_ring, barriers(2 * Q_STAGES, 1), barriers(2 * Q_STAGES, 1), barriers(K_STAGES, 1),
        barriers(K_STAGES, 2), barriers(V_STAGES, 1), barriers(V_STAGES, 2),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), q, k, out, lse, dq, delta, tiles, context, factor, cap, scale, tokens, items,
                programs, rounds, stride_qt, memory, GROUP, KV_HEADS, D, Q_STAGES, K_STAGES, V_STAGES, CAUSAL, WINDOW,
                SOFTCAP, SHARED,
            )),
            (_consume, (
                gl.constexpr(1), q, k, out, lse, dq, delta, tiles, context, factor, cap, scale, tokens, items,
                programs, rounds, stride_qt, memory, GROUP, KV_HEADS, D, Q_STAGES, K_STAGES, V_STAGES, CAUSAL, WINDOW,
                SOFTCAP, SHARED,
            )),
            (_produce, (
                q, dout, out, k, v, tiles, context, items, programs, rounds, memory, GROUP, KV_HEADS, Q_STAGES,
                K_STAGES, V_STAGES, SHARED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


def dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor, causal: bool, window: int,
    softcap: float, scale: float, context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launches the kernel: dq, and delta for that of dK and dV. `tiles` are those of `hopper_tile_sizes`."""
    result = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    delta = torch.empty(lse.shape[1:], dtype=torch.float32, device=q.device)
    tokens, kv_heads, d = k.shape
    group = q.shape[1] // kv_heads
    padded, width = padded_group(group), max(64, padded_head_dim(d))
    q, k, v, out, dout = readable(q, k, v, out, dout)
    items, programs, rounds = schedule(tiles, kv_heads)
    hopper_dq_kernel[(programs,)](
        *(described(x, [HOPPER_ROWS // 2 // padded, padded, width]) for x in (q, dout, out)),
        *(described(x, [HOPPER_DQ_KEYS, 1, width]) for x in (k, v)),
        lse, result, delta, tiles, context, *_factors(softcap, scale), scale, tokens, items, programs,
        rounds, result.stride(0),
        GROUP=group, KV_HEADS=kv_heads, D=d, Q_STAGES=Q_STAGES, K_STAGES=K_STAGES, V_STAGES=V_STAGES, CAUSAL=causal,
        WINDOW=window, SOFTCAP=softcap > 0, SHARED=context is not None, **PARTITIONS,
    )  # fmt: skip
    return result, delta
