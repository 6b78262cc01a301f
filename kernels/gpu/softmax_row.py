"""One row of logits in Triton: softcap, maximum and sums in one sweep over tiles, then its gradient written in place.

A tile is [UNROLL, LANES]. Axis 0 lies inside a thread, so running maxima and sums are kept per lane without talking to
another thread; the lanes are combined once, after the last tile. Sweep 1 has three tiles in flight (asynchronous copies
to shared memory), sweep 2 two. The logits y are scale * softcap * tanh(z / softcap), without a softcap scale * z.

Sweep 2 starts where sweep 1 ended, with the tiles that are still in the second-level cache, and goes down the row. Half
as wide as a float32 logit, the gradient goes to the upper half of the row: whatever a tile overwrites lies in itself
or in tiles above, which have been read. `dlogits` in linear_head.py makes the matrix of it.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every logit, and finite: differences of two of them are no NaN


@triton.jit
def exp(x):
    """e^x of float32, a few ulp."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def tanh(x):
    """tanh(x) of float32, within 2 ulp: a polynomial below |x| = 0.6, (1 - t) / (1 + t) with t = e^-2|x| above."""
    magnitude = tl.abs(x)
    t = exp(-2.0 * magnitude)
    large = (1.0 - t) / (1.0 + t)
    s = x * x
    p = -0.005856427851185549 * s + 0.020757475434213055
    p = p * s - 0.05376992178162181
    p = p * s + 0.1333170470213052
    p = p * s - 0.3333328397177112
    p = p * s + 0.9999999975630964
    return tl.where(magnitude < 0.6, x * p, tl.where(x < 0, -large, large))


@triton.jit
def capped(z, softcap, scale, SOFTCAP: tl.constexpr, SCALED: tl.constexpr):
    """y of z, and tanh(z / softcap), 0 without a softcap."""
    y = z.to(tl.float32)
    t = 0.0
    if SOFTCAP:
        t = tanh(y * (1.0 / softcap))
        y = softcap * t
    if SCALED:
        y = scale * y
    return y, t


@triton.jit
def _fold(
    z_V, start, vocab, target, y_target, softcap, scale, top, exp_sum, sum, shift_sum, above,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, SUM: tl.constexpr, ENTROPY: tl.constexpr, MASKED: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Adds one tile to the sums of the lanes."""
    at = start + tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if MASKED:
        y, _ = capped(tl.load(z_V + at, mask=at < vocab, other=0.0), softcap, scale, SOFTCAP, SCALED)
        if SUM:
            sum += tl.sum(tl.where(at < vocab, y, 0.0), axis=0)
        y = tl.where(at < vocab, y, LOWEST)
    else:
        y, _ = capped(tl.load(z_V + at), softcap, scale, SOFTCAP, SCALED)
        if SUM:
            sum += tl.sum(y, axis=0)
    # The target is the prediction where no logit is above its own, and none before it equal.
    above += tl.sum(((y > y_target) | ((y == y_target) & (at < target))).to(tl.int32), axis=0)
    new_top = tl.maximum(top, tl.max(y, axis=0))
    shifted = y - new_top[None, :]
    e = exp(shifted)
    rescale = exp(top - new_top)
    if ENTROPY:
        shift_sum = (shift_sum + exp_sum * (top - new_top)) * rescale + tl.sum(e * shifted, axis=0)
    exp_sum = exp_sum * rescale + tl.sum(e, axis=0)
    return new_top, exp_sum, sum, shift_sum, above


@triton.jit
def row_sums(
    z_V, vocab, target, softcap, scale,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, SUM: tl.constexpr, ENTROPY: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sweep 1 over the row at z_V.

    Returns:
        max of y; log of sum(e^(y - max)), float64; log-probability of the target, float64; whether the target is the
        first index of the maximum; sum of y (0 without SUM); entropy of softmax(y) (0 without ENTROPY).
    """
    y_target, _ = capped(tl.load(z_V + target), softcap, scale, SOFTCAP, SCALED)
    top = tl.full([LANES], LOWEST, tl.float32)
    exp_sum = tl.zeros([LANES], tl.float32)
    sum = tl.zeros([LANES], tl.float32)
    shift_sum = tl.zeros([LANES], tl.float32)
    above = tl.zeros([LANES], tl.int32)
    full = vocab // (UNROLL * LANES) * (UNROLL * LANES)
    for start in tl.range(0, full, UNROLL * LANES, num_stages=3):
        top, exp_sum, sum, shift_sum, above = _fold(
            z_V, start, vocab, target, y_target, softcap, scale, top, exp_sum, sum, shift_sum, above,
            SOFTCAP, SCALED, SUM, ENTROPY, False, UNROLL, LANES,
        )  # fmt: skip
    if full < vocab:
        top, exp_sum, sum, shift_sum, above = _fold(
            z_V, full, vocab, target, y_target, softcap, scale, top, exp_sum, sum, shift_sum, above,
            SOFTCAP, SCALED, SUM, ENTROPY, True, UNROLL, LANES,
        )  # fmt: skip
    row_max = tl.max(top, axis=0)
    rescale = exp(top - row_max)
    total = tl.sum(exp_sum * rescale, axis=0)
    # float64, once a row: in float32 the logarithm alone would be as far off as all that came before.
    log_sum = tl.log(total.to(tl.float64))
    logprob = (y_target.to(tl.float64) - row_max.to(tl.float64)) - log_sum
    entropy = 0.0
    if ENTROPY:
        shift_sum = (shift_sum + exp_sum * (top - row_max)) * rescale
        entropy = (log_sum - tl.div_rn(tl.sum(shift_sum, axis=0), total).to(tl.float64)).to(tl.float32)
    return row_max, log_sum, logprob, tl.sum(above, axis=0) == 0, tl.sum(sum, axis=0), entropy


@triton.jit
def _gradient(
    z, at, target, row_max, log_sum, at_target, of_p, of_plogp, constant, softcap, scale,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, PLOGP: tl.constexpr,
):  # fmt: skip
    y, t = capped(z, softcap, scale, SOFTCAP, SCALED)
    logp = (y - row_max) - log_sum
    factor = of_p
    if PLOGP:
        factor = of_p + of_plogp * logp
    dy = factor * exp(logp) + constant + tl.where(at == target, at_target, 0.0)
    if SCALED:
        dy = scale * dy
    if SOFTCAP:
        dy *= 1.0 - t * t
    return dy


@triton.jit
def write_gradient(
    z_V, dz_V, vocab, target, row_max, log_sum, at_target, of_p, of_plogp, constant, softcap, scale,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, PLOGP: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sweep 2: dz = dy/dz * (p * (of_p + of_plogp * log p) + constant + at_target at the target), p = softmax(y).

    dz_V may overlap z_V as the head of this file describes, or be z_V.
    """
    TILE: tl.constexpr = UNROLL * LANES
    tile = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    full = vocab // TILE * TILE
    if full < vocab:
        at = full + tile
        z = tl.load(z_V + at, mask=at < vocab, other=0.0)
        dz = _gradient(
            z, at, target, row_max, log_sum, at_target, of_p, of_plogp, constant, softcap, scale,
            SOFTCAP, SCALED, PLOGP,
        )  # fmt: skip
        tl.debug_barrier()  # every thread has read its part of the tile that is overwritten now
        tl.store(dz_V + at, dz.to(dz_V.dtype.element_ty), mask=at < vocab)
    if full > 0:
        # A loop with a barrier is not pipelined by the compiler: the next tile is read by hand.
        z = tl.load(z_V + full - TILE + tile)
        for done in range(TILE, full, TILE):
            at = full - done + tile
            following = tl.load(z_V + at - TILE)
            dz = _gradient(
                z, at, target, row_max, log_sum, at_target, of_p, of_plogp, constant, softcap, scale,
                SOFTCAP, SCALED, PLOGP,
            )  # fmt: skip
            tl.debug_barrier()
            tl.store(dz_V + at, dz.to(dz_V.dtype.element_ty))
            z = following
        dz = _gradient(
            z, tile, target, row_max, log_sum, at_target, of_p, of_plogp, constant, softcap, scale,
            SOFTCAP, SCALED, PLOGP,
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(dz_V + tile, dz.to(dz_V.dtype.element_ty))


@triton.jit
def clear_row(dz_V, vocab, TILE: tl.constexpr):
    """Zeros, for a row past the last one that counts: the matmuls of the gradient go over it."""
    for start in range(0, vocab, TILE):
        at = start + tl.arange(0, TILE)
        tl.store(dz_V + at, tl.zeros([TILE], dz_V.dtype.element_ty), mask=at < vocab)


def tile_of(vocab: int) -> dict[str, int]:
    """UNROLL, LANES and num_warps for rows of `vocab` logits: 16 bytes a thread and load, four loads at a time.

    A multiprocessor holds one program of 16 warps: the rows in flight then fit the second-level cache best.
    """
    warps = 4 if vocab <= 8192 else 16
    return {"UNROLL": 4, "LANES": warps * 32 * 4, "num_warps": warps}
