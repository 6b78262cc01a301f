"""Triton backward kernels of packed_attention; see packed_attention.py."""

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
def _probabilities(product, high, low, factor, cap, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr):
    """Probabilities from saved sums, and tanh of the capped logits."""
    logits, tanh = base2_logits(product, factor, cap, SOFTCAP)
    if FLOAT32:
        return tl.exp2((logits - high) - low), tanh
    return tl.exp2(logits - high), tanh


@triton.jit
def _dq_step(
    q, dout, k, v, dq, high, low, delta, query, key, limit, factor, cap, window,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    zeros = tl.zeros([q.shape[0], k.shape[0]], tl.float32)
    p, tanh = _probabilities(dot(q, k.T, zeros), high[:, None], low[:, None], factor, cap, SOFTCAP, FLOAT32)
    if EDGE:
        p = tl.where(visible(query[:, None], key[None, :], limit, window, CAUSAL, WINDOWED), p, 0.0)
    ds = p * (dot(dout, v.T, zeros) - delta[:, None])
    if WINDOWED and EDGE:
        # A query that sees its own key alone has probability 1 whatever the logit: no rounding may pass for a gradient.
        ds = tl.where(window == 1, 0.0, ds)
    if SOFTCAP:
        ds *= 1 - tanh * tanh
    return dot(ds.to(k.dtype), k, dq)


@triton.jit
def _exact_sums(
    q, dout, k, v, mass, total, high, low, query, col_start, col_end, factor, cap, window, stride_kt, stride_vt,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Adds P and P dP of a range of keys: with nearly all of P on one key sum(dout * out) rounds. Two more matmuls."""
    zeros = tl.zeros([q.shape[0], BLOCK], tl.float32)
    key = tl.arange(0, BLOCK)
    d = tl.arange(0, BLOCK_D)
    for col in range(col_start, col_end, BLOCK):
        at = tl.cast(col, tl.int64)
        k_tile = load(k + at * stride_kt + key[:, None] * stride_kt + d[None, :], col + key, col_end, True, D, BLOCK_D)
        v_tile = load(v + at * stride_vt + key[:, None] * stride_vt + d[None, :], col + key, col_end, True, D, BLOCK_D)
        p, _ = _probabilities(dot(q, k_tile.T, zeros), high[:, None], low[:, None], factor, cap, SOFTCAP, True)
        p = tl.where(visible(query[:, None], (col + key)[None, :], col_end, window, CAUSAL, WINDOWED), p, 0.0)
        mass += tl.sum(p, 1)
        total += tl.sum(p * dot(dout, v_tile.T, zeros), 1)
    return mass, total


@triton.jit
def _dq_edges(
    q_tile, dout_tile, k, v, acc, high, low, delta_tile, query, col_start, full_start, full_end, col_end, factor, cap,
    window, stride_kt, stride_vt, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, SOME: tl.constexpr,
):  # fmt: skip
    """Adds the edges of a range of keys to dQ."""
    key = tl.arange(0, EDGE_N)
    d = tl.arange(0, BLOCK_D)
    k_offsets, v_offsets = key[:, None] * stride_kt + d[None, :], key[:, None] * stride_vt + d[None, :]
    for i in range(edge_blocks(col_start, full_start, full_end, col_end, EDGE_N, SOME)):
        col, limit = edge_columns(i, col_start, full_start, full_end, col_end, EDGE_N)
        at = tl.cast(col, tl.int64)
        k_tile = load(k + at * stride_kt + k_offsets, col + key, limit, True, D, BLOCK_D)
        v_tile = load(v + at * stride_vt + v_offsets, col + key, limit, True, D, BLOCK_D)
        acc = _dq_step(
            q_tile, dout_tile, k_tile, v_tile, acc, high, low, delta_tile, query, col + key, limit, factor, cap, window,
            CAUSAL, WINDOWED, SOFTCAP, FLOAT32, True,
        )  # fmt: skip
    return acc


@triton.jit
def _dq_interior(
    q_tile, dout_tile, k, v, k_desc, v_desc, acc, high, low, delta_tile, head, query, full_start, full_end, factor, cap,
    window, stride_kt, stride_vt, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Adds the keys of a range that need no mask to dQ."""
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
        acc = _dq_step(
            q_tile, dout_tile, k_tile, v_tile, acc, high, low, delta_tile, query, key, 0, factor, cap, window,
            CAUSAL, WINDOWED, SOFTCAP, FLOAT32, False,
        )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq_kernel(
    q, k, v, out, dout, lse, dq, delta, k_desc, v_desc, tiles, context, factor, cap, scale, window, tokens, kv_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_gt, stride_gh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, SHARED: tl.constexpr,
    TMA: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of queries. Also writes delta, which dkdv_kernel reads: it must run first."""
    head, row_start, row_end, col_start, full_start, full_end, col_end = tile_bounds(tiles, kv_heads, 1, BLOCK_N)

    row = tl.arange(0, BLOCK_M)
    rows = (row_end - row_start) * GROUP
    local = tl.maximum(tl.minimum(row, rows - 1), 0)
    query = row_start + local // GROUP
    first, first_head = row_start.to(tl.int64), head.to(tl.int64) * GROUP
    q += first * stride_qt + first_head * stride_qh
    out += first * stride_ot + first_head * stride_oh
    dout += first * stride_gt + first_head * stride_gh
    # Rows of no document are not read: whatever they hold, their gradients are zero.
    count = tl.where(col_start < col_end, rows, 0)
    q_tile = load(q + row_offsets(local, stride_qt, stride_qh, GROUP, D, BLOCK_D), local, count, True, D, BLOCK_D)
    dout_tile = load(dout + row_offsets(local, stride_gt, stride_gh, GROUP, D, BLOCK_D), local, count, True, D, BLOCK_D)
    base = (head.to(tl.int64) * tokens + row_start) * GROUP
    high = tl.load(lse + base + local)
    low = high
    if FLOAT32:
        low = tl.load(lse + kv_heads.to(tl.int64) * tokens * GROUP + base + local)

    k += head.to(tl.int64) * stride_kh
    v += head.to(tl.int64) * stride_vh
    if FLOAT32:
        mass, total = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        if SHARED:
            place, last = context_places(context, kv_heads)
            for at in range(place, last, 5):
                ctx_start, _, _, ctx_end, gap = context_range(context + at, 1, BLOCK_N)
                mass, total = _exact_sums(
                    q_tile, dout_tile, k, v, mass, total, high, low, query - gap, ctx_start, ctx_end, factor, cap,
                    window, stride_kt, stride_vt, D, BLOCK_D, EDGE_N, CAUSAL, WINDOWED, SOFTCAP,
                )  # fmt: skip
        else:
            mass, total = _exact_sums(
                q_tile, dout_tile, k, v, mass, total, high, low, query, col_start, col_end, factor, cap, window,
                stride_kt, stride_vt, D, BLOCK_D, EDGE_N, CAUSAL, WINDOWED, SOFTCAP,
            )  # fmt: skip
        delta_tile = tl.where(mass == 0, 0.0, total / tl.where(mass == 0, 1.0, mass))
    else:
        out_rows = row_offsets(local, stride_ot, stride_oh, GROUP, D, BLOCK_D)
        out_tile = load(out + out_rows, local, count, True, D, BLOCK_D)
        delta_tile = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    stored = row < rows
    tl.store(delta + base + row, delta_tile, stored)

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if SHARED:
        place, last = context_places(context, kv_heads)
        for at in range(place, last, 5):
            col_start, full_start, full_end, col_end, gap = context_range(context + at, 1, BLOCK_N)
            acc = _dq_edges(
                q_tile, dout_tile, k, v, acc, high, low, delta_tile, query - gap, col_start, full_start, full_end,
                col_end, factor, cap, window, stride_kt, stride_vt, D, BLOCK_D, EDGE_N, CAUSAL, WINDOWED, SOFTCAP,
                FLOAT32, False,
            )  # fmt: skip
        for at in range(place, last, 5):
            _, full_start, full_end, _, _ = context_range(context + at, 1, BLOCK_N)
            acc = _dq_interior(
                q_tile, dout_tile, k, v, k_desc, v_desc, acc, high, low, delta_tile, head, query, full_start, full_end,
                factor, cap, window, stride_kt, stride_vt, D, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, FLOAT32, TMA,
            )  # fmt: skip
    else:
        acc = _dq_edges(
            q_tile, dout_tile, k, v, acc, high, low, delta_tile, query, col_start, full_start, full_end, col_end,
            factor, cap, window, stride_kt, stride_vt, D, BLOCK_D, EDGE_N, CAUSAL, WINDOWED, SOFTCAP, FLOAT32, WGMMA,
        )  # fmt: skip
        acc = _dq_interior(
            q_tile, dout_tile, k, v, k_desc, v_desc, acc, high, low, delta_tile, head, query, full_start, full_end,
            factor, cap, window, stride_kt, stride_vt, D, BLOCK_D, BLOCK_N, CAUSAL, WINDOWED, SOFTCAP, FLOAT32, TMA,
        )  # fmt: skip

    stored_2d = stored[:, None] if BLOCK_D == D else stored[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    # dq is contiguous.
    dq += (first * kv_heads + head) * GROUP * D
    tl.store(
        dq + row_offsets(row, kv_heads * GROUP * D, D, GROUP, D, BLOCK_D),
        (acc * scale).to(dq.dtype.element_ty),
        stored_2d,
    )


@triton.jit
def _dkdv_step(
    q, dout, k, v, dk, dv, high, low, delta, query, key, window, factor, cap,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, WGMMA: tl.constexpr,
    EDGE: tl.constexpr,
):  # fmt: skip
    """Adds one tile of packed queries to dK and dV; everything is transposed, [keys, queries]."""
    zeros = tl.zeros([k.shape[0], q.shape[0]], tl.float32)
    if WGMMA:
        # Its sum starts at -delta: behind the exponentials delta would wait in registers, for which there are none.
        dp = dot(v, dout.T, zeros - delta[None, :])
    p, tanh = _probabilities(dot(k, q.T, zeros), high[None, :], low[None, :], factor, cap, SOFTCAP, FLOAT32)
    if EDGE:
        seen = visible(query[None, :], key[:, None], 2147483647, window, CAUSAL, WINDOWED)
        p = tl.where(seen, p, 0.0)
    dv = dot(p.to(dout.dtype), dout, dv)
    if not WGMMA:
        dp = dot(v, dout.T, zeros) - delta[None, :]
    ds = p * dp
    if WINDOWED and EDGE:
        # A query that sees its own key alone has probability 1 whatever the logit: no rounding may pass for a gradient.
        ds = tl.where(window == 1, 0.0, ds)
    if SOFTCAP:
        ds *= 1 - tanh * tanh
    return dot(ds.to(q.dtype), q, dk), dv


@triton.jit
def _dkdv_edges(
    q, dout, lse, lse_low, delta, k_tile, v_tile, dk_acc, dv_acc, key, col_start, full_start, full_end, col_end, gap,
    factor, cap, window, stride_qt, stride_qh, stride_gt, stride_gh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, WGMMA: tl.constexpr, SOME: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Adds the edges of a range of packed queries to dK and dV."""
    m = tl.arange(0, BLOCK_M)

    for i in tl.range(edge_blocks(col_start, full_start, full_end, col_end, BLOCK_M, SOME), num_stages=STAGES):
        col, limit = edge_columns(i, col_start, full_start, full_end, col_end, BLOCK_M)
        token = col // GROUP
        local = col - token * GROUP + m
        at = tl.cast(token, tl.int64)
        q_tile = load(
            q + at * stride_qt + row_offsets(local, stride_qt, stride_qh, GROUP, D, BLOCK_D), col + m, limit, True, D,
            BLOCK_D,
        )  # fmt: skip
        dout_tile = load(
            dout + at * stride_gt + row_offsets(local, stride_gt, stride_gh, GROUP, D, BLOCK_D), col + m, limit, True,
            D, BLOCK_D,
        )  # fmt: skip
        # Rows past the edge are zeros in q, dout, lse and delta: they add nothing.
        valid = col + m < limit
        high = tl.load(lse + col + m, mask=valid, other=0.0)
        low = high
        if FLOAT32:
            low = tl.load(lse_low + col + m, mask=valid, other=0.0)
        delta_tile = tl.load(delta + col + m, mask=valid, other=0.0)
        dk_acc, dv_acc = _dkdv_step(
            q_tile, dout_tile, k_tile, v_tile, dk_acc, dv_acc, high, low, delta_tile, token + local // GROUP - gap, key,
            window, factor, cap, CAUSAL, WINDOWED, SOFTCAP, FLOAT32, WGMMA, True,
        )  # fmt: skip
    return dk_acc, dv_acc


@triton.jit
def _dkdv_interior(
    q, dout, q_desc, dout_desc, lse, lse_low, delta, k_tile, v_tile, dk_acc, dv_acc, head, key, full_start, full_end,
    factor, cap, window, stride_qt, stride_qh, stride_gt, stride_gh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, TMA: tl.constexpr,
    WGMMA: tl.constexpr,
):  # fmt: skip
    """Adds the packed queries of a range that need no mask to dK and dV."""
    m = tl.arange(0, BLOCK_M)
    for col in range(full_start, full_end, BLOCK_M):
        token = col // GROUP
        local = col - token * GROUP + m
        if TMA:
            q_tile = q_desc.load([token, head * GROUP, 0]).reshape(BLOCK_M, BLOCK_D)
            dout_tile = dout_desc.load([token, head * GROUP, 0]).reshape(BLOCK_M, BLOCK_D)
        else:
            at = tl.cast(token, tl.int64)
            q_tile = load(
                q + at * stride_qt + row_offsets(local, stride_qt, stride_qh, GROUP, D, BLOCK_D), m, 0, False, D,
                BLOCK_D,
            )  # fmt: skip
            dout_tile = load(
                dout + at * stride_gt + row_offsets(local, stride_gt, stride_gh, GROUP, D, BLOCK_D), m, 0, False, D,
                BLOCK_D,
            )  # fmt: skip
        high = tl.load(lse + col + m)
        low = high
        if FLOAT32:
            low = tl.load(lse_low + col + m)
        delta_tile = tl.load(delta + col + m)
        dk_acc, dv_acc = _dkdv_step(
            q_tile, dout_tile, k_tile, v_tile, dk_acc, dv_acc, high, low, delta_tile, token + local // GROUP, key,
            window, factor, cap, CAUSAL, WINDOWED, SOFTCAP, FLOAT32, WGMMA, False,
        )  # fmt: skip
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, q_desc, dout_desc, tiles, context, factor, cap, scale, window, tokens, kv_heads,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SOFTCAP: tl.constexpr, FLOAT32: tl.constexpr, SHARED: tl.constexpr,
    TMA: tl.constexpr, WGMMA: tl.constexpr, EDGE_STAGES: tl.constexpr,
):  # fmt: skip
    """dK and dV of a tile of keys: a loop over the packed queries, of the whole group, that see it."""
    # Columns are packed rows here.
    head, row_start, row_end, col_start, full_start, full_end, col_end = tile_bounds(tiles, kv_heads, GROUP, BLOCK_M)

    row, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key = row_start + row
    first = row_start.to(tl.int64)
    # As in dq_kernel; keys past the tile get probabilities too, in rows that are not stored.
    limit = tl.where(col_start < col_end, row_end, row_start)
    k += first * stride_kt + head.to(tl.int64) * stride_kh
    v += first * stride_vt + head.to(tl.int64) * stride_vh
    k_tile = load(k + row[:, None] * stride_kt + d[None, :], key, limit, True, D, BLOCK_D)
    v_tile = load(v + row[:, None] * stride_vt + d[None, :], key, limit, True, D, BLOCK_D)

    q += head.to(tl.int64) * GROUP * stride_qh
    dout += head.to(tl.int64) * GROUP * stride_gh
    lse += head.to(tl.int64) * tokens * GROUP
    lse_low = lse + kv_heads.to(tl.int64) * tokens * GROUP
    delta += head.to(tl.int64) * tokens * GROUP
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    if SHARED:
        place, last = context_places(context, kv_heads)
        for at in range(place, last, 5):
            col_start, full_start, full_end, col_end, gap = context_range(context + at, GROUP, BLOCK_M)
            dk_acc, dv_acc = _dkdv_edges(
                q, dout, lse, lse_low, delta, k_tile, v_tile, dk_acc, dv_acc, key, col_start, full_start, full_end,
                col_end, gap, factor, cap, window, stride_qt, stride_qh, stride_gt, stride_gh, GROUP, D, BLOCK_D,
                BLOCK_M, CAUSAL, WINDOWED, SOFTCAP, FLOAT32, WGMMA, False, EDGE_STAGES,
            )  # fmt: skip
        for at in range(place, last, 5):
            _, full_start, full_end, _, _ = context_range(context + at, GROUP, BLOCK_M)
            dk_acc, dv_acc = _dkdv_interior(
                q, dout, q_desc, dout_desc, lse, lse_low, delta, k_tile, v_tile, dk_acc, dv_acc, head, key, full_start,
                full_end, factor, cap, window, stride_qt, stride_qh, stride_gt, stride_gh, GROUP, D, BLOCK_D, BLOCK_M,
                CAUSAL, WINDOWED, SOFTCAP, FLOAT32, TMA, WGMMA,
            )  # fmt: skip
    else:
        dk_acc, dv_acc = _dkdv_edges(
            q, dout, lse, lse_low, delta, k_tile, v_tile, dk_acc, dv_acc, key, col_start, full_start, full_end, col_end,
            0, factor, cap, window, stride_qt, stride_qh, stride_gt, stride_gh, GROUP, D, BLOCK_D, BLOCK_M, CAUSAL,
            WINDOWED, SOFTCAP, FLOAT32, WGMMA, WGMMA, EDGE_STAGES,
        )  # fmt: skip
        dk_acc, dv_acc = _dkdv_interior(
            q, dout, q_desc, dout_desc, lse, lse_low, delta, k_tile, v_tile, dk_acc, dv_acc, head, key, full_start,
            full_end, factor, cap, window, stride_qt, stride_qh, stride_gt, stride_gh, GROUP, D, BLOCK_D, BLOCK_M,
            CAUSAL, WINDOWED, SOFTCAP, FLOAT32, TMA, WGMMA,
        )  # fmt: skip

    stored = (key < row_end)[:, None] if BLOCK_D == D else (key < row_end)[:, None] & (d < D)[None, :]
    # dk and dv are contiguous.
    at = (first * kv_heads + head) * D
    offsets = row[:, None] * (kv_heads * D) + d[None, :]
    tl.store(dk + at + offsets, (dk_acc * scale).to(dk.dtype.element_ty), stored)
    tl.store(dv + at + offsets, dv_acc.to(dv.dtype.element_ty), stored)
