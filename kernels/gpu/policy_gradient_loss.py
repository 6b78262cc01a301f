"""policy_gradient_loss on GPUs: what a token's loss is depends on its own logits alone, so a row is reduced, its
objective evaluated and its gradient written over its logits at once: one matmul for the logits, one for each gradient.

With a ratio per sequence the gradient waits for the sequence's last token. Without an entropy bonus only a factor does:
d(loss)/dy of a row is that times onehot - softmax. Over a frozen head dhidden is therefore made for the factor 1 and
scaled at the end; a row is read once, and there are two matmuls. A trained head sums rows that have their factors, and
an entropy bonus adds a second direction: there the logits are computed and read a second time, since those of all
chunks do not fit.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_head import CountedRows, LinearHeadChunks
from .softmax_row import exp
from .token_rows import CISPO, OBJECTIVES, REINFORCE, CudaRows, Policy, TritonRows, clipped, slope
from .workload import Workload, meta


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
        slopes += tl.where(counted, weight * slope(mean.to(tl.float32), advantage, lower, upper, 0), 0.0)
    mean_slope = tl.div_rn(tl.sum(slopes, axis=0), length)
    inverse = tl.load(inverse_ptr).to(tl.float32)
    for start in range(begin, end, BLOCK):
        token = start + tl.arange(0, BLOCK)
        counted, weight = _counted(targets_T, weights_T, token, token < end, ignore_index, WEIGHTS)
        g = mean_slope + 0.0 * weight
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
        bounded, low, high = clipped(ratio, advantage, lower, upper, OBJECTIVE)
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
    *,
    cuda_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels; results as the op's schema has them, dhead in float32."""
    targets, advantages = targets.contiguous(), advantages.contiguous()
    old, ref, weights = (None if x is None else x.contiguous() for x in (old_logprobs, ref_logprobs, token_weights))
    tokens, vocab = targets.numel(), lm_head.shape[0]
    counted = CountedRows(
        targets, vocab, ignore_index, counted_rows, weights=weights, normalizer=normalizer,
        finite={"advantages": advantages, "old_logprobs": old, "ref_logprobs": ref},
    )  # fmt: skip
    policy = Policy(
        OBJECTIVES[objective], advantages, counted.inverse, old, ref, weights,
        1.0 - clip_low, 1.0 + clip_high, kl_coef, entropy_coef,
    )  # fmt: skip
    gradient = need_dhidden or need_dhead
    chunks = LinearHeadChunks(hidden, lm_head, counted, need_dhidden, need_dhead)
    rows = (CudaRows if cuda_rows else TritonRows)(counted, targets, vocab, temperature, softcap)
    log_ratio = hidden.new_empty(tokens, dtype=torch.float64)

    by_token, in_one_pass = policy, gradient
    if cu_seqlens is not None:
        # dhidden of a gradient of 1 by each log-probability, for now.
        minus_one, one = torch.full_like(advantages, -1.0), torch.ones_like(counted.inverse)
        by_token = Policy(OBJECTIVES["reinforce"], minus_one, one)
        in_one_pass = need_dhidden and not need_dhead and entropy_coef == 0
    for first, n in chunks:
        z = chunks.logits(first, n)
        if cu_seqlens is None or in_one_pass:
            rows.objective(z, chunks.dlogits(n) if in_one_pass else None, first, by_token, log_ratio)
        else:
            rows.measure(z, first)
        if in_one_pass:
            chunks.backward(first, n)
    if cu_seqlens is not None:
        dlogprob, dentropy = _by_sequence(cu_seqlens, counted, targets, ignore_index, policy, rows.logprob, log_ratio)
        if in_one_pass:
            chunks.scale_dhidden(dlogprob)
        elif gradient:
            for first, n in chunks:
                rows.gradient(chunks.logits(first, n), chunks.dlogits(n), first, dlogprob, dentropy)
                chunks.backward(first, n)

    loss = hidden.new_empty((), dtype=torch.float32)
    counts, sums = hidden.new_empty(3, dtype=torch.int64), hidden.new_empty(5, dtype=torch.float32)
    _report[(1,)](
        counted.rows, counted.count, advantages, old, ref, weights, counted.inverse, rows.logprob, rows.entropy,
        log_ratio, loss, counts, sums, *policy.coefficients, OBJECTIVE=policy.objective, **policy.given, BLOCK=512,
        num_warps=4,
    )  # fmt: skip
    return loss, counts, sums, chunks.dhidden, chunks.dhead


def _by_sequence(
    cu_seqlens: Tensor, counted: CountedRows, targets: Tensor, ignore_index: int, policy: Policy, logprob: Tensor,
    log_ratio: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients by log-probability and entropy; log_ratio becomes that of each token's sequence."""
    tokens = targets.numel()
    ordered = (cu_seqlens[0] == 0) & (cu_seqlens.diff() >= 0).all() & (cu_seqlens[-1] <= tokens)
    torch._assert_async(ordered, f"cu_seqlens: expected offsets from 0, never decreasing, up to {tokens}")
    dlogprob, dentropy = (targets.new_zeros(tokens, dtype=torch.float32) for _ in range(2))
    valid = (counted.count == 0).int()  # what holds without any sequence
    if cu_seqlens.numel() > 1:
        _sequences[(cu_seqlens.numel() - 1,)](
            cu_seqlens.contiguous(), counted.rows, counted.count, targets, logprob, policy.advantages, policy.old,
            policy.ref, policy.weights, counted.inverse, log_ratio, dlogprob, dentropy, valid,
            tokens, ignore_index, *policy.coefficients, **policy.given, BLOCK=256, num_warps=4,
        )  # fmt: skip
    torch._assert_async(valid[0], "cu_seqlens: expected every row that counts inside a document")
    return dlogprob, dentropy


def workloads() -> list[Workload]:
    """The size of record with KL and entropy, by token and by sequence (there without entropy: two matmuls); softcap
    and temperature."""
    listed = []
    for width, vocab, objective, entropy_coef, options in (
        (4096, 128256, "clip", 0.001, (1.0, 0.0)),
        (4096, 128256, "sequence_clip", 0.0, (1.0, 0.0)),
        (3584, 256000, "cispo", 0.001, (0.7, 30.0)),
    ):
        h, head, t = meta(8192, width), meta(vocab, width), meta(8192, dtype=torch.int64)
        v, cu = meta(8192, dtype=torch.float32), meta(17, dtype=torch.int32)
        sequences = cu if objective == "sequence_clip" else None
        call = partial(
            policy_gradient_loss, h, head, t, v, v, v, v, sequences, None, objective, 0.2, 0.28, 0.01, entropy_coef,
            *options, -100, None, True, False,
        )  # fmt: skip
        name = f"policy_gradient_loss: {objective} 8192 x {width} x {vocab}, frozen head"
        listed.append(Workload(name, call, 2 * h.nbytes + head.nbytes, 2 * 2 * 8192 * width * vocab))
    return listed
