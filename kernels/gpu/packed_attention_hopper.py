"""The forward pass of packed_attention for Hopper, in Gluon: two consumer warpgroups and a warp that loads for them.

A tile holds 128 packed query rows (packed_attention.py: token times head of a group), 64 to each consumer. The producer
copies queries, keys and values by TMA into rings of shared memory; both consumers read the same keys and values. A
program takes items (tile, key/value head) from the list, longest first and back and forth, and its producer runs ahead
into the next item: nothing waits for memory at the start of a tile but the first. Groups that are no power of two get
the rows of one (PADDED), which are computed and not stored.

Edges (blocks of 64 keys with a mask) come first, one after another. In the interior (blocks of 128) a consumer starts
S = Q K^T of the next block, then O += P V of this one, and computes the softmax of S while P V runs:

    tensor cores   | S1 | P0 V | S2 | P1 V | ...        consumer 0; consumer 1 fills what is left
    exponentials   | P0 |   P1      |   P2      | ...

Floor, D 128, a block of 64 x 128: 1024 cycles of tensor cores for its two products (4096 FLOPs a cycle), 512 of the
exponential unit (16 a cycle), about 320 of other softmax arithmetic. So exponentials hide if products never wait for
them; at D 64 the two are equal. Registers of a thread: 64 for O, 64 for S, 32 for P, about 45 of addresses and rows:
240 are given out, of 168 on average (three warpgroups), and 24 to the producer.

PINGPONG: consumers take turns to start their products, so that the softmax of one meets the products of the other.
Otherwise that is left to chance. Values are the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .attention_blocks import HOPPER_ROWS, hopper_edge, padded_group, padded_head_dim
from .attention_hopper_common import (
    advance,
    barriers,
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
    softmax,
    start_product,
    store_queries,
    wide,
)
from .attention_hopper_launch import PARTITIONS, described, readable, schedule
from .packed_attention import _factors


@gluon.jit
def _produce(
    q, k, v, k_edge, v_edge, tiles, context, items, programs, rounds, memory,
    GROUP: gl.constexpr, KV_HEADS: gl.constexpr, BLOCK_N: gl.constexpr, EDGE_N: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr, SHARED: gl.constexpr,
):  # fmt: skip
    """The producer: every copy, in the order in which the consumers want them."""
    q_slots, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free, _turn = memory
    TOKENS: gl.constexpr = q.block_type.shape[0]
    WIDTH: gl.constexpr = q.block_type.shape[2]
    Q_BYTES: gl.constexpr = TOKENS * q.block_type.shape[1] * WIDTH * 2
    slot, phase, q_slot, q_phase = 0, 0, 0, 0
    row = load_item(tiles, nth_item(0, programs), items, KV_HEADS)
    place, last = load_places(context, nth_item(0, programs), items, KV_HEADS, SHARED)
    for i in range(rounds):
        item = nth_item(i, programs)
        row_start, _row_end, col_start, full_start, full_end, col_end = bounds(row, BLOCK_N)
        row = load_item(tiles, nth_item(i + 1, programs), items, KV_HEADS)
        next_place, next_last = load_places(context, nth_item(i + 1, programs), items, KV_HEADS, SHARED)
        head = item % KV_HEADS
        if (item < items) & (col_start < col_end):
            for w in gl.static_range(2):
                at = w * Q_STAGES + q_slot
                fetch(
                    q, [row_start + w * TOKENS, head * GROUP, 0], q_slots.index(at), q_ready.index(at),
                    q_free.index(at), q_phase, Q_BYTES,
                )  # fmt: skip
            q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
            for at in range(place, last, 5):
                if SHARED:
                    following = load_range(context, at, last)
                for e in range(edge_blocks(col_start, full_start, full_end, col_end, EDGE_N)):
                    col, _limit = edge_columns(e, col_start, full_start, full_end, col_end, EDGE_N)
                    k_slot = part(k_ring.index(slot), k_edge, EDGE_N, WIDTH)
                    v_slot = part(v_ring.index(slot), v_edge, EDGE_N, WIDTH)
                    EDGE_BYTES: gl.constexpr = EDGE_N * WIDTH * 2
                    fetch(k_edge, [col, head, 0], k_slot, k_ready.index(slot), k_free.index(slot), phase, EDGE_BYTES)
                    fetch(v_edge, [col, head, 0], v_slot, v_ready.index(slot), v_free.index(slot), phase, EDGE_BYTES)
                    slot, phase = advance(slot, phase, STAGES)
                for col in range(full_start, full_end, BLOCK_N):
                    BYTES: gl.constexpr = BLOCK_N * WIDTH * 2
                    k_slot, v_slot = k_ring.index(slot), v_ring.index(slot)
                    fetch(k, [col, head, 0], k_slot, k_ready.index(slot), k_free.index(slot), phase, BYTES)
                    fetch(v, [col, head, 0], v_slot, v_ready.index(slot), v_free.index(slot), phase, BYTES)
                    slot, phase = advance(slot, phase, STAGES)
                if SHARED:
                    col_start, full_start, full_end, col_end, _gap = range_bounds(following, BLOCK_N)
        place, last = next_place, next_last


@gluon.jit
def _store(
    acc, row_max, row_sum, out, lse, head, row_start, row_end, tokens, stride_ot, stride_oh,
    GROUP: gl.constexpr, PADDED: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr,
    DTYPE: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Output and lse of 64 rows. Rows without a key belong to no document: they get zeros."""
    empty = row_sum == 0
    row_sum = gl.where(empty, 1.0, row_sum)
    row = gl.arange(0, ROWS, ROW)
    stored = (row_start + row // PADDED < row_end) & (row % PADDED < GROUP)
    lse += (wide(head) * wide(tokens) + row_start) * GROUP
    gl.store(lse + row // PADDED * GROUP + row % PADDED, gl.where(empty, 0.0, row_max + gl.log2(row_sum)), mask=stored)

    store_queries(
        acc * (1 / row_sum)[:, None], out, head, row_start, row_end, stride_ot, stride_oh, GROUP, PADDED, D, ROWS,
        WIDTH, DTYPE,
    )  # fmt: skip


@gluon.jit
def _consume(
    W: gl.constexpr, q, k_edge, v_edge, out, lse, tiles, context, factor, cap, window, tokens, items, programs,
    rounds, stride_ot, stride_oh, memory, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr,
    BLOCK_N: gl.constexpr, EDGE_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    WINDOWED: gl.constexpr, SOFTCAP: gl.constexpr, SHARED: gl.constexpr, PINGPONG: gl.constexpr,
):  # fmt: skip
    """A consumer: rows 64 W to 64 W + 63 of every tile."""
    q_slots, k_ring, v_ring, q_ready, q_free, k_ready, k_free, v_ready, v_free, turn = memory
    dtype: gl.constexpr = q.dtype
    TOKENS: gl.constexpr = q.block_type.shape[0]
    PADDED: gl.constexpr = q.block_type.shape[1]
    WIDTH: gl.constexpr = q.block_type.shape[2]
    ROWS: gl.constexpr = TOKENS * PADDED
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    INNER: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    EDGE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, EDGE_N, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, ACC)

    slot, phase, q_slot, q_phase, my_turn = 0, 0, 0, 0, 1 - W
    row = load_item(tiles, nth_item(0, programs), items, KV_HEADS)
    place, last = load_places(context, nth_item(0, programs), items, KV_HEADS, SHARED)
    for i in range(rounds):
        item = nth_item(i, programs)
        row_start, row_end, col_start, full_start, full_end, col_end = bounds(row, BLOCK_N)
        row_start += W * TOKENS
        query = row_start + gl.arange(0, ROWS, ROW) // PADDED
        acc = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
        row_max = gl.full([ROWS], float("-inf"), gl.float32, ROW)
        row_sum = gl.zeros([ROWS], gl.float32, ROW)
        if (item < items) & (col_start < col_end):
            at = W * Q_STAGES + q_slot
            q_tile = q_slots.index(at).reshape([ROWS, WIDTH])
            mbarrier.wait(q_ready.index(at), q_phase)

            gap = 0
            for at_range in range(place, last, 5):
                if SHARED and WIDTH <= 128:
                    following_range = load_range(context, at_range, last)
                for e in range(edge_blocks(col_start, full_start, full_end, col_end, EDGE_N)):
                    col, limit = edge_columns(e, col_start, full_start, full_end, col_end, EDGE_N)
                    mbarrier.wait(k_ready.index(slot), phase)
                    k_tile = part(k_ring.index(slot), k_edge, EDGE_N, WIDTH).reshape([EDGE_N, WIDTH])
                    s = start_product(q_tile, k_tile, ROWS, EDGE_N, EDGE)
                    mbarrier.wait(v_ready.index(slot), phase)
                    v_tile = part(v_ring.index(slot), v_edge, EDGE_N, WIDTH).reshape([EDGE_N, WIDTH])
                    if col + EDGE_N > limit:
                        clear_rows(v_tile, limit - col, EDGE_N, WIDTH)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    mbarrier.arrive(k_free.index(slot))
                    key = col + gl.arange(0, EDGE_N, gl.SliceLayout(0, EDGE))
                    p, keep, row_max, row_sum = softmax(
                        s, row_max, row_sum, query - gap, key, limit, factor, cap, window, CAUSAL, WINDOWED, SOFTCAP,
                        True, EDGE, ROW,
                    )  # fmt: skip
                    p = gl.convert_layout(p.to(dtype), OPERAND, assert_trivial=True)
                    acc *= keep[:, None]
                    acc = warpgroup_mma(p, v_tile, acc, is_async=True)
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    mbarrier.arrive(v_free.index(slot))
                    slot, phase = advance(slot, phase, STAGES)

                if full_start < full_end:
                    mbarrier.wait(k_ready.index(slot), phase)
                    k_tile = k_ring.index(slot).reshape([BLOCK_N, WIDTH])
                    s = start_product(q_tile, k_tile, ROWS, BLOCK_N, INNER)
                    s = warpgroup_mma_wait(0, deps=(s,))
                    mbarrier.arrive(k_free.index(slot))
                    p, keep, row_max, row_sum = softmax(
                        s, row_max, row_sum, query, query, 0, factor, cap, window, CAUSAL, WINDOWED, SOFTCAP, False,
                        INNER, ROW,
                    )  # fmt: skip
                    acc *= keep[:, None]
                    p = gl.convert_layout(p.to(dtype), OPERAND, assert_trivial=True)
                    for col in range(full_start + BLOCK_N, full_end, BLOCK_N):  # noqa: B007
                        next_slot, next_phase = advance(slot, phase, STAGES)
                        mbarrier.wait(k_ready.index(next_slot), next_phase)
                        if PINGPONG:
                            in_order(turn.index(W), my_turn)
                            my_turn ^= 1
                        k_tile = k_ring.index(next_slot).reshape([BLOCK_N, WIDTH])
                        s = start_product(q_tile, k_tile, ROWS, BLOCK_N, INNER)
                        mbarrier.wait(v_ready.index(slot), phase)
                        acc = warpgroup_mma(p, v_ring.index(slot).reshape([BLOCK_N, WIDTH]), acc, is_async=True)
                        if PINGPONG:
                            mbarrier.arrive(turn.index(1 - W))
                        s = warpgroup_mma_wait(1, deps=(s,))
                        mbarrier.arrive(k_free.index(next_slot))
                        following, keep, row_max, row_sum = softmax(
                            s, row_max, row_sum, query, query, 0, factor, cap, window, CAUSAL, WINDOWED, SOFTCAP, False,
                            INNER, ROW,
                        )  # fmt: skip
                        in_order(q_ready.index(at), q_phase)
                        acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                        mbarrier.arrive(v_free.index(slot))
                        acc *= keep[:, None]
                        p = gl.convert_layout(following.to(dtype), OPERAND, assert_trivial=True)
                        slot = next_slot
                        phase = next_phase
                    mbarrier.wait(v_ready.index(slot), phase)
                    acc = warpgroup_mma(p, v_ring.index(slot).reshape([BLOCK_N, WIDTH]), acc, is_async=True)
                    if not SHARED:
                        mbarrier.arrive(q_free.index(at))
                    acc, p = warpgroup_mma_wait(0, deps=(acc, p))
                    mbarrier.arrive(v_free.index(slot))
                    slot, phase = advance(slot, phase, STAGES)
                elif not SHARED:
                    mbarrier.arrive(q_free.index(at))
                if SHARED:
                    if WIDTH > 128:  # registers for it only now
                        following_range = load_range(context, at_range, last)
                    col_start, full_start, full_end, col_end, gap = range_bounds(following_range, BLOCK_N)
            if SHARED:
                mbarrier.arrive(q_free.index(at))
            q_slot, q_phase = advance(q_slot, q_phase, Q_STAGES)
        row = load_item(tiles, nth_item(i + 1, programs), items, KV_HEADS)
        place, last = load_places(context, nth_item(i + 1, programs), items, KV_HEADS, SHARED)
        if item < items:
            _store(
                acc, row_max, row_sum, out, lse, item % KV_HEADS, row_start, row_end, tokens, stride_ot, stride_oh,
                GROUP, PADDED, D, ROWS, WIDTH, dtype, ROW,
            )  # fmt: skip


@gluon.jit(do_not_specialize=["window", "tokens", "items", "programs", "rounds"])
def hopper_forward_kernel(
    q, k, v, k_edge, v_edge, out, lse, tiles, context, factor, cap, window, tokens, items, programs, rounds,
    stride_ot, stride_oh, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr,
    EDGE_N: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAP: gl.constexpr, SHARED: gl.constexpr, PINGPONG: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Output and lse, as forward_kernel of packed_attention_forward.py; k_edge and v_edge are k and v, EDGE_N rows."""
    Q_SHAPE: gl.constexpr = q.block_type.shape
    q_slots = gl.allocate_shared_memory(q.dtype, [2 * Q_STAGES, Q_SHAPE[0], Q_SHAPE[1], Q_SHAPE[2]], q.layout)
    k_ring = gl.allocate_shared_memory(k.dtype, [STAGES, BLOCK_N, 1, Q_SHAPE[2]], k.layout)
    v_ring = gl.allocate_shared_memory(v.dtype, [STAGES, BLOCK_N, 1, Q_SHAPE[2]], v.layout)
    memory = (
        q_slots, k_ring, v_ring, barriers(2 * Q_STAGES, 1), barriers(2 * Q_STAGES, 1), barriers(STAGES, 1),
        barriers(STAGES, 2), barriers(STAGES, 1), barriers(STAGES, 2), barriers(2, 1),
    )  # fmt: skip
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consume, (
                gl.constexpr(0), q, k_edge, v_edge, out, lse, tiles, context, factor, cap, window, tokens, items,
                programs, rounds, stride_ot, stride_oh, memory, GROUP, KV_HEADS, D, BLOCK_N, EDGE_N, STAGES, Q_STAGES,
                CAUSAL, WINDOWED, SOFTCAP, SHARED, PINGPONG,
            )),
            (_consume, (
                gl.constexpr(1), q, k_edge, v_edge, out, lse, tiles, context, factor, cap, window, tokens, items,
                programs, rounds, stride_ot, stride_oh, memory, GROUP, KV_HEADS, D, BLOCK_N, EDGE_N, STAGES, Q_STAGES,
                CAUSAL, WINDOWED, SOFTCAP, SHARED, PINGPONG,
            )),
            (_produce, (
                q, k, v, k_edge, v_edge, tiles, context, items, programs, rounds, memory, GROUP, KV_HEADS, BLOCK_N,
                EDGE_N, STAGES, Q_STAGES, SHARED,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Keys of an interior block, and slots of the rings of keys (and values) and of queries."""

    block_n: int
    stages: int
    q_stages: int


# By padded head dimension: what 227 KiB of shared memory and 240 registers hold.
SIZES = {64: Sizes(128, 4, 2), 128: Sizes(128, 2, 2), 256: Sizes(64, 2, 1)}


def packed_attention_hopper(
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
    pingpong: bool,
    gluon_dq: bool,
    gluon_dkdv: bool,
    forward_context: Tensor | None = None,
    dq_context: Tensor | None = None,
    dkdv_context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel: out, lse. `forward_tiles` has tiles of `hopper_tile_sizes`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tokens, kv_heads, d = k.shape
    group = q.shape[1] // kv_heads
    lse = torch.empty((1, kv_heads, tokens * group), dtype=torch.float32, device=q.device)
    if tokens == 0:
        return out, lse
    padded, width = padded_group(group), max(64, padded_head_dim(d))
    sizes = SIZES[width]
    items, programs, rounds = schedule(forward_tiles, kv_heads)
    q, k, v = readable(q, k, v)
    query_block = [HOPPER_ROWS // 2 // padded, padded, width]
    hopper_forward_kernel[(programs,)](
        described(q, query_block),
        *(described(x, [rows, 1, width]) for rows in (sizes.block_n, hopper_edge(d)) for x in (k, v)),
        out, lse, forward_tiles, forward_context, *_factors(softcap, scale), window, tokens, items, programs,
        rounds, out.stride(0), out.stride(1),
        GROUP=group, KV_HEADS=kv_heads, D=d, BLOCK_N=sizes.block_n, EDGE_N=hopper_edge(d), STAGES=sizes.stages,
        Q_STAGES=sizes.q_stages, CAUSAL=causal, WINDOWED=window > 0, SOFTCAP=softcap > 0,
        SHARED=forward_context is not None, PINGPONG=pingpong, **PARTITIONS,
    )  # fmt: skip
    return out, lse
