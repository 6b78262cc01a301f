"""Triton forward kernel of packed_attention; see packed_attention.py."""

import triton
import triton.language as tl

from .attention_common import (
    UNSPECIALIZED,
    base2_logits,
    context_places,
    context_range,
    dot,
    edge_blocks,
    edge_columns,
    load,
    row_offsets,
    tile_bounds,
    visible,
)


@triton.jit
def _forward_step(
    q, k, v, acc, row_max, row_sum, query, key, limit, factor, cap, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Takes one tile of keys into the running softmax."""
    product = dot(q, k.T, tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if EDGE or SOFTCAP:
        logits, _ = base2_logits(product, factor, cap, SOFTCAP)
        if EDGE:
            seen = visible(query[:, None], key[None, :], limit, window, CAUSAL, WINDOWED)
            logits = tl.where(seen, logits, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logits, 1))
        # A row of a window may have met no key yet.
        base = tl.where(new_max == float("-inf"), 0.0, new_max) if EDGE else new_max
        p = tl.exp2(logits - base[:, None])
    else:
        # factor >= 0, so that the scaled maximum is the maximum of the scaled: one multiply-add for each element.
        new_max = tl.maximum(row_max, tl.max(product, 1) * factor)
        base = new_max
        p = tl.exp2(product * factor - base[:, None])
    keep = tl.exp2(row_max - base)
    acc = dot(p.to(v.dtype), v, acc * keep[:, None])
    return acc, new_max, row_sum * keep + tl.sum(p, 1)


@triton.jit
def _forward_edges(
    q_tile, k, v, acc, row_max, row_sum, query, col_start, full_start, full_end, col_end, factor, cap, window,
    stride_kt, stride_vt, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Takes the edges of a range of keys into the running softmax."""
    key = tl.arange(0, EDGE_N)
    d = tl.arange(0, BLOCK_D)
    k_offsets, v_offsets = key[:, None] * stride_kt + d[None, :], key[:, None] * stride_vt + d[None, :]
    for i in range(edge_blocks(col_start, full_start, full_end, col_end, EDGE_N, SOME)):
        col, limit = edge_columns(i, col_start, full_start, full_end, col_end, EDGE_N)
        at = tl.cast(col, tl.int64)
        k_tile = load(k + at * stride_kt + k_offsets, col + key, limit, True, D, BLOCK_D)
        v_tile = load(v + at * stride_vt + v_offsets, col + key, limit, True, D, BLOCK_D)
        acc, row_max, row_sum = _forward_step(
            q_tile, k_tile, v_tile, acc, row_max, row_sum, query, col + key, limit, factor, cap, window,
            CAUSAL, WINDOWED, SOFTCAP, True,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def _forward_interior(
    q_tile, k, v, k_desc, v_desc, acc, row_max, row_sum, head, query, full_start, full_end, factor, cap, window,
    stride_kt, stride_vt, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Takes the keys of a range that need no mask into the running softmax."""
    key = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    k_offsets, v_offsets = key[:, None] * stride_kt + d[None, :], key[:, None] * stride_vt + d[None, :]
    for col in range(full_start, full_end, BLOCK_N):
        if TMA:
            k_tile = k_desc.load([col, head, 0]).reshape(BLOCK_N, BLOCK_D)
            v_tile = v_desc.load([col, head, 0]).reshape(BLOCK_N, BLOCK_D)
        else:
            at = tl.cast(col, tl.int64)
            k_tile = load(k + at * stride_kt + k_offsets, key, 0, False, D, BLOCK_D)
            v_tile = load(v + at * stride_vt + v_offsets, key, 0, False, D, BLOCK_D)
        acc, row_max, row_sum = _forward_step(
            q_tile, k_tile, v_tile, acc, row_max, row_sum, query, key, 0, factor, cap, window,
            CAUSAL, WINDOWED, SOFTCAP, False,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q, k, v, out, lse, k_desc, v_desc, tiles, context, factor, cap, window, tokens, kv_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, SHARED: tl.constexpr,
    TMA: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """Output and lse of a tile of queries."""
    head, row_start, row_end, col_start, full_start, full_end, col_end = tile_bounds(tiles, kv_heads, 1, BLOCK_N)

    row = tl.arange(0, BLOCK_M)
    rows = (row_end - row_start) * GROUP
    # Rows past the tile repeat its last one: they stay finite, and are not stored.
    local = tl.maximum(tl.minimum(row, rows - 1), 0)
    query = row_start + local // GROUP
    first, first_head = row_start.to(tl.int64), head.to(tl.int64) * GROUP
    q += first * stride_qt + first_head * stride_qh
    q_tile = load(q + row_offsets(local, stride_qt, stride_qh, GROUP, D, BLOCK_D), local, rows, True, D, BLOCK_D)

    k += head.to(tl.int64) * stride_kh
    v += head.to(tl.int64) * stride_vh
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    if SHARED:
        # Two loops over the ranges, not one: what the edges need would take registers from the interior.
        place, last = context_places(context, kv_heads)
        for at in range(place, last, 5):
            col_start, full_start, full_end, col_end, gap = context_range(context + at, 1, BLOCK_N)
            acc, row_max, row_sum = _forward_edges(
                q_tile, k, v, acc, row_max, row_sum, query - gap, col_start, full_start, full_end, col_end, factor,
                cap, window, stride_kt, stride_vt, D, BLOCK_D, EDGE_N, CAUSAL, WINDOWED, SOFTCAP, False,
            )  # fmt: skip
        for at in range(place, last, 5):
            _, full_start, full_end, _, _ = context_range(context + at, 1, BLOCK_N)
            acc, row_max, row_sum = _forward_interior(
                q_tile, k, v, k_desc, v_desc, acc, row_max, row_sum, head, query, full_start, full_end, factor, cap,
                window, stride_kt, stride_vt, D, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, TMA,
            )  # fmt: skip
    else:
        acc, row_max, row_sum = _forward_edges(
            q_tile, k, v, acc, row_max, row_sum, query, col_start, full_start, full_end, col_end, factor, cap, window,
            stride_kt, stride_vt, D, BLOCK_D, EDGE_N, CAUSAL, WINDOWED, SOFTCAP, WGMMA,
        )  # fmt: skip
        acc, row_max, row_sum = _forward_interior(
            q_tile, k, v, k_desc, v_desc, acc, row_max, row_sum, head, query, full_start, full_end, factor, cap, window,
            stride_kt, stride_vt, D, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, TMA,
        )  # fmt: skip

    # A tile without columns holds rows of no document: they get zeros.
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    acc = acc / row_sum[:, None]
    out += first * stride_ot + first_head * stride_oh
    stored = row < rows
    stored_2d = stored[:, None] if BLOCK_D == D else stored[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    tl.store(out + row_offsets(row, stride_ot, stride_oh, GROUP, D, BLOCK_D), acc.to(out.dtype.element_ty), stored_2d)
    lse += (head.to(tl.int64) * tokens + row_start) * GROUP
    log_sum = tl.log2(row_sum)
    high = tl.where(empty, 0.0, row_max + log_sum)
    tl.store(lse + row, high, stored)
    if FLOAT32:
        low = tl.where(empty, 0.0, (row_max - high) + log_sum)
        tl.store(lse + kv_heads.to(tl.int64) * tokens * GROUP + row, low, stored)
