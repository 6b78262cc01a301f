"""policy_gradient_loss in Triton: what a token's loss is depends on its own logits alone, so one program a row reduces
the logits, evaluates the objective and writes the gradient over them: one matmul for the logits, one for each gradient.

With a ratio per sequence the gradient waits for the sequence's last token, and the logits are computed a second time.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_head import CountedRows, LinearHeadChunks
from .linear_token_logprobs import token_logprobs, token_logprobs_backward
from .softmax_row import clear_row, exp, row_sums, tile_of, write_gradient
from .workload import Workload, meta

OBJECTIVES = {"clip": 0, "sequence_clip": 0, "cispo": 1, "reinforce": 2}
CISPO, REINFORCE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _clipped(ratio, advantage, lower, upper, OBJECTIVE: tl.constexpr):
    """The ratio inside its bounds; whether the lower, the upper bound replaces it."""
    below = ratio < lower
    above = ratio > upper
    bounded = tl.where(below, lower, tl.where(above, upper, ratio))
    if OBJECTIVE == REINFORCE:
        return bounded, below & (ratio < 0), above & (ratio < 0)  # no ratio, no bounds
    elif OBJECTIVE == CISPO:
        return bounded, below & (advantage != 0), above & (advantage != 0)
    else:
        # -min(ratio * A, bounded * A): the bound holds only where it makes the objective smaller.
        return bounded, below & (advantage < 0), above & (advantage > 0)


@triton.jit
def _slope(log_ratio, advantage, lower, upper, OBJECTIVE: tl.constexpr):
    """d(policy objective)/d(log-ratio); without a gradient through the ratio, d(policy objective)/d(logprob)."""
    ratio = exp(log_ratio)
    bounded, low, high = _clipped(ratio, advantage, lower, upper, OBJECTIVE)
    if OBJECTIVE == REINFORCE:
        return -advantage
    elif OBJECTIVE == CISPO:
        return -bounded * advantage
    else:
        return tl.where(low | high, 0.0, -ratio * advantage)


@triton.jit
def _rows(
    z_RV, dz_RV, rows_T, count_ptr, targets_T, advantages_T, old_T, ref_T, weights_T, inverse_ptr,
    logprob_T, entropy_T, log_ratio_T,
    first, vocab, stride, dz_stride, lower, upper, kl_coef, entropy_coef, softcap, scale,
    OBJECTIVE: tl.constexpr, OLD: tl.constexpr, REF: tl.constexpr, WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row of an objective by token."""
    row = first + tl.program_id(0)
    z_V = z_RV + tl.program_id(0).to(tl.int64) * stride
    dz_V = dz_RV + tl.program_id(0).to(tl.int64) * dz_stride
    if row < tl.load(count_ptr):
        token = tl.load(rows_T + row)
        target = tl.load(targets_T + token).to(tl.int32)
        row_max, log_sum, exact_logprob, _, _, entropy = row_sums(
            z_V, vocab, target, softcap, scale, SOFTCAP, SCALED, False, True, UNROLL, LANES
        )
        logprob = exact_logprob.to(tl.float32)
        log_ratio = 0.0 * row_max  # the old policy is this one
        if OLD:
            exact_log_ratio = exact_logprob - tl.load(old_T + token).to(tl.float64)
            log_ratio = exact_log_ratio.to(tl.float32)
            tl.store(log_ratio_T + token, exact_log_ratio)
        else:
            tl.store(log_ratio_T + token, 0.0)
        tl.store(logprob_T + token, exact_logprob)
        tl.store(entropy_T + token, entropy)
        if GRADIENT:
            slope = _slope(log_ratio, tl.load(advantages_T + token), lower, upper, OBJECTIVE)
            if REF:
                slope += kl_coef * (1.0 - exp(tl.load(ref_T + token) - logprob))
            weight = tl.load(inverse_ptr).to(tl.float32)
            if WEIGHTS:
                weight *= tl.load(weights_T + token)
            g = weight * slope
            h = -weight * entropy_coef
            # As in linear_token_logprobs: d logprob / dy = onehot - p, d entropy / dy = -p * (log p + entropy).
            write_gradient(
                z_V, dz_V, vocab, target, row_max, log_sum.to(tl.float32), g, -(g + h * entropy), -h, 0.0,
                softcap, scale, SOFTCAP, SCALED, True, UNROLL, LANES,
            )  # fmt: skip
    elif GRADIENT:
        clear_row(dz_V, vocab, UNROLL * LANES)


@triton.jit
def _counted(targets_T, weights_T, token, inside, ignore_index, WEIGHTS: tl.constexpr):
    counted = inside & (tl.load(targets_T + token, mask=inside, other=0) != ignore_index)
    weight = counted.to(tl.float32)
    if WEIGHTS:
        weight = tl.load(weights_T + token, mask=counted, other=0.0)
    return counted & (weight != 0), weight


@triton.jit
def _load(values_T, token, inside):
    return tl.load(values_T + token, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def _sequences(
    cu_seqlens_S, rows_T, count_ptr, targets_T, logprob_T, advantages_T, old_T, ref_T, weights_T, inverse_ptr,
    log_ratio_T, dlogprob_T, dentropy_T, valid_ptr,
    tokens, ignore_index, lower, upper, kl_coef, entropy_coef,
    OLD: tl.constexpr, REF: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence: its ratio is the geometric mean of its tokens' ratios. Gradients by logprob and entropy."""
    if tl.program_id(0) == 0:
        count = tl.load(count_ptr)
        last = tl.load(rows_T + tl.maximum(count, 1) - 1, mask=count > 0, other=-1)
        tl.store(valid_ptr, (last < tl.load(cu_seqlens_S + tl.num_programs(0))).to(tl.int32))
    # Offsets that are out of order fail elsewhere; here they only must not lead out of the tensors.
    begin = tl.maximum(tl.load(cu_seqlens_S + tl.program_id(0)), 0)
    end = tl.minimum(tl.load(cu_seqlens_S + tl.program_id(0) + 1), tokens)
    sums = tl.zeros([BLOCK], tl.float64)
    lengths = tl.zeros([BLOCK], tl.int32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        counted, _ = _counted(targets_T, weights_T, token, token < end, ignore_index, WEIGHTS)
        if OLD:
            sums += _load(logprob_T, token, counted) - _load(old_T, token, counted)
        lengths += counted.to(tl.int32)
    length = tl.maximum(tl.sum(lengths, axis=0), 1).to(tl.float32)
    per_token = tl.div_rn(1.0, length).to(tl.float64)
    per_token = per_token * (2.0 - length.to(tl.float64) * per_token)
    mean = tl.zeros([BLOCK], tl.float64) + tl.sum(sums, axis=0) * per_token
    slopes = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        counted, weight = _counted(targets_T, weights_T, token, token < end, ignore_index, WEIGHTS)
        advantage = tl.load(advantages_T + token, mask=counted, other=0.0)
        slopes += tl.where(counted, weight * _slope(mean.to(tl.float32), advantage, lower, upper, 0), 0.0)
    slope = tl.div_rn(tl.sum(slopes, axis=0), length)
    inverse = tl.load(inverse_ptr).to(tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        counted, weight = _counted(targets_T, weights_T, token, token < end, ignore_index, WEIGHTS)
        g = slope + 0.0 * weight
        if REF:
            difference = _load(ref_T, token, counted) - _load(logprob_T, token, counted)
            g += weight * kl_coef * (1.0 - exp(difference.to(tl.float32)))
        tl.store(dlogprob_T + token, inverse * g, mask=counted)
        tl.store(dentropy_T + token, -inverse * weight * entropy_coef, mask=counted)
        tl.store(log_ratio_T + token, mean, mask=counted)


@triton.jit
def _report(
    rows_T, count_ptr, advantages_T, old_T, ref_T, weights_T, inverse_ptr, logprob_T, entropy_T, log_ratio_T,
    loss_ptr, counts_3, sums_5, lower, upper, kl_coef, entropy_coef,
    OBJECTIVE: tl.constexpr, OLD: tl.constexpr, REF: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Loss and sums over the rows that count, in their order; in float64, since k3 is a small difference."""
    count = tl.load(count_ptr)
    loss = tl.zeros([BLOCK], tl.float64)
    entropies = tl.zeros([BLOCK], tl.float64)
    kls = tl.zeros([BLOCK], tl.float64)
    old_kls = tl.zeros([BLOCK], tl.float64)
    ratios = tl.zeros([BLOCK], tl.float64)
    largest = tl.zeros([BLOCK], tl.float32)
    lows = tl.zeros([BLOCK], tl.int32)
    highs = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        inside = start + tl.arange(0, BLOCK) < count
        token = tl.load(rows_T + start + tl.arange(0, BLOCK), mask=inside, other=0)
        logprob, entropy = _load(logprob_T, token, inside), _load(entropy_T, token, inside)
        log_ratio, advantage = _load(log_ratio_T, token, inside), _load(advantages_T, token, inside)
        one = inside.to(tl.float64)
        ratio = one * tl.exp(log_ratio)
        bounded, low, high = _clipped(ratio, advantage, lower, upper, OBJECTIVE)
        if OBJECTIVE == REINFORCE:
            token_loss = -advantage * logprob
        elif OBJECTIVE == CISPO:
            token_loss = -bounded * advantage * logprob
        else:
            token_loss = -tl.where(low | high, bounded, ratio) * advantage
        token_loss -= entropy_coef * entropy
        if REF:
            difference = _load(ref_T, token, inside) - logprob
            kl = one * (tl.exp(difference) - difference - 1.0)
            kls += kl
            token_loss += kl_coef * kl
        if OLD:
            difference = logprob - _load(old_T, token, inside)
            old_kls += one * (tl.exp(difference) - difference - 1.0)
        if WEIGHTS:
            token_loss *= _load(weights_T, token, inside)
        loss += token_loss
        entropies += entropy
        ratios += ratio
        largest = tl.maximum(largest, tl.abs(log_ratio).to(tl.float32))
        lows += (inside & low).to(tl.int32)
        highs += (inside & high).to(tl.int32)
    tl.store(loss_ptr, (tl.sum(loss, axis=0) * tl.load(inverse_ptr)).to(tl.float32))
    tl.store(counts_3, tl.cast(count, tl.int64))
    tl.store(counts_3 + 1, tl.sum(lows, axis=0).to(tl.int64))
    tl.store(counts_3 + 2, tl.sum(highs, axis=0).to(tl.int64))
    tl.store(sums_5, tl.sum(entropies, axis=0).to(tl.float32))
    tl.store(sums_5 + 1, tl.sum(kls, axis=0).to(tl.float32))
    tl.store(sums_5 + 2, tl.sum(old_kls, axis=0).to(tl.float32))
    tl.store(sums_5 + 3, tl.sum(ratios, axis=0).to(tl.float32))
    tl.store(sums_5 + 4, tl.max(largest, axis=0))


def policy_gradient_loss(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    token_weights: Tensor | None,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    objective: str,
    clip_low: float,
    clip_high: float,
    kl_coef: float,
    entropy_coef: float,
    temperature: float,
    softcap: float,
    ignore_index: int,
    counted_rows: int | None,
    need_dhidden: bool,
    need_dhead: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels; results as the op's schema has them, dhead in float32."""
    targets, advantages = targets.contiguous(), advantages.contiguous()
    old, ref, weights = (None if x is None else x.contiguous() for x in (old_logprobs, ref_logprobs, token_weights))
    tokens, vocab = targets.numel(), lm_head.shape[0]
    counted = CountedRows(
        targets, vocab, ignore_index, counted_rows, weights=weights, normalizer=normalizer,
        finite={"advantages": advantages, "old_logprobs": old, "ref_logprobs": ref},
    )  # fmt: skip
    gradient = need_dhidden or need_dhead
    coefficients = (1.0 - clip_low, 1.0 + clip_high, kl_coef, entropy_coef)
    given = {"OLD": old is not None, "REF": ref is not None, "WEIGHTS": weights is not None}
    objective_id = OBJECTIVES[objective]
    chunks = LinearHeadChunks(hidden, lm_head, counted, need_dhidden, need_dhead)
    log_ratio = hidden.new_empty(tokens, dtype=torch.float64)
    if cu_seqlens is None:
        logprob = hidden.new_empty(tokens, dtype=torch.float64)
        entropy = hidden.new_empty(tokens, dtype=torch.float32)
        for first, n in chunks:
            z = chunks.logits(first, n)
            dz = chunks.dlogits(n)
            _rows[(n,)](
                z, dz, counted.rows, counted.count, targets, advantages, old, ref, weights, counted.inverse,
                logprob, entropy, log_ratio,
                first, vocab, z.stride(0), dz.stride(0), *coefficients, softcap, 1.0 / temperature,
                OBJECTIVE=objective_id, GRADIENT=gradient, SOFTCAP=softcap > 0, SCALED=temperature != 1,
                **given, **tile_of(vocab),
            )  # fmt: skip
            if gradient:
                chunks.backward(first, n)
    else:
        _check_cu_seqlens(cu_seqlens, tokens)
        logprob, entropy, softmax = token_logprobs(chunks, counted, targets, temperature, softcap, torch.float64)
        dlogprob, dentropy = (hidden.new_empty(tokens, dtype=torch.float32) for _ in range(2))
        valid = (counted.count == 0).int()  # what holds without any sequence
        if cu_seqlens.numel() > 1:
            _sequences[(cu_seqlens.numel() - 1,)](
                cu_seqlens.contiguous(), counted.rows, counted.count, targets, logprob, advantages, old, ref, weights,
                counted.inverse, log_ratio, dlogprob, dentropy, valid,
                tokens, ignore_index, *coefficients, **given, BLOCK=256, num_warps=4,
            )  # fmt: skip
        torch._assert_async(valid[0], "cu_seqlens: expected every row that counts inside a document")
        if gradient:
            token_logprobs_backward(
                chunks, counted, dlogprob, dentropy, targets, entropy, softmax, temperature, softcap
            )

    loss = hidden.new_empty((), dtype=torch.float32)
    counts, sums = hidden.new_empty(3, dtype=torch.int64), hidden.new_empty(5, dtype=torch.float32)
    _report[(1,)](
        counted.rows, counted.count, advantages, old, ref, weights, counted.inverse, logprob, entropy, log_ratio,
        loss, counts, sums, *coefficients, OBJECTIVE=objective_id, **given, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return loss, counts, sums, chunks.dhidden, chunks.dhead


def _check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    ordered = (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all() & (cu_seqlens[-1] <= tokens)
    torch._assert_async(ordered, f"cu_seqlens: expected offsets from 0, never decreasing, up to {tokens}")


def workloads() -> list[Workload]:
    """The size of record with KL and entropy, by token and by sequence; softcap and temperature."""
    listed = []
    for width, vocab, objective, options in (
        (4096, 128256, "clip", (1.0, 0.0)),
        (4096, 128256, "sequence_clip", (1.0, 0.0)),
        (3584, 256000, "cispo", (0.7, 30.0)),
    ):
        h, head, t = meta(8192, width), meta(vocab, width), meta(8192, dtype=torch.int64)
        v, cu = meta(8192, dtype=torch.float32), meta(17, dtype=torch.int32)
        sequences = cu if objective == "sequence_clip" else None
        call = partial(
            policy_gradient_loss, h, head, t, v, v, v, v, sequences, None, objective, 0.2, 0.28, 0.01, 0.001, *options,
            -100, None, True, False,
        )  # fmt: skip
        name = f"policy_gradient_loss: {objective} 8192 x {width} x {vocab}, frozen head"
        matmuls = 3 if sequences is not None else 2
        listed.append(Workload(name, call, 2 * h.nbytes + head.nbytes, matmuls * 2 * 8192 * width * vocab))
    return listed
