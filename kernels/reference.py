"""One plain-torch definition per op: the oracle of every test, and the backend for any device and dtype.

Written to be read. Each runs in float64 for float64 inputs and in float32 otherwise, and rounds to the inputs' dtype
at the end.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a reference computes: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension."""
    wide = x.to(compute_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)` and `x + residual`."""
    total = x + residual
    return rms_norm(total, weight, eps, weight_offset), total


def weighted_linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    source_ids: Tensor | None,
    num_sources: int,
    normalizer: Tensor | None,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    counted_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, then per source: weighted nll, weight, counted tokens, correct tokens."""
    weights, counted = _weights(hidden, lm_head, targets, token_weights, ignore_index)
    _require_bound(counted, counted_rows)
    sources = torch.zeros_like(targets) if source_ids is None else source_ids.long()
    _require(~counted | ((sources >= 0) & (sources < num_sources)), "source_ids", sources, f"0 <= id < {num_sources}")

    logits = _logits(hidden, lm_head, counted, softcap)
    log_z = logits.logsumexp(-1)
    target = targets.masked_fill(~counted, 0)
    nll = log_z - logits.gather(-1, target[:, None])[:, 0]
    smoothed = (1 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(-1))
    per_token = smoothed + z_loss * log_z.square()
    loss = (weights * per_token).sum() * _inverse_normalizer(weights, normalizer)

    def per_source(values: Tensor) -> Tensor:
        return values.new_zeros(num_sources).index_add(0, sources.masked_fill(~counted, 0), values)

    correct = counted & (logits.argmax(-1) == target)
    return (
        loss,
        per_source((weights * nll).detach()),
        per_source(weights.detach()),
        per_source(counted.long()),
        per_source(correct.long()),
    )


def linear_token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    ignore_index: int,
    counted_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(softcapped logits / temperature)."""
    kept = targets != ignore_index
    _require_targets(targets, kept, lm_head.shape[0])
    _require_bound(kept, counted_rows)
    logprobs = (_logits(hidden, lm_head, kept, softcap) / temperature).log_softmax(-1)
    logprob = logprobs.gather(-1, targets.masked_fill(~kept, 0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.where(kept, logprob, 0), torch.where(kept, entropy, 0)


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
    softcap: float | None,
    ignore_index: int,
    counted_rows: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss; counts (all, clipped low, clipped high); sums of entropy, KL to reference and old policy, ratio, max."""
    weights, counted = _weights(hidden, lm_head, targets, token_weights, ignore_index)
    _require_bound(counted, counted_rows)
    logprob, entropy = linear_token_logprobs(
        hidden, lm_head, targets.masked_fill(~counted, ignore_index), temperature, softcap, ignore_index
    )

    def values(argument: str, given: Tensor | None) -> Tensor:
        if given is None:
            return logprob.detach()
        _require(~counted | given.isfinite(), argument, given, "a finite number")
        return given.to(logprob.dtype).masked_fill(~counted, 0)

    advantage = values("advantages", advantages)
    token_log_ratio = logprob - values("old_logprobs", old_logprobs)
    log_ratio = token_log_ratio
    if cu_seqlens is not None:
        log_ratio = _sequence_means(token_log_ratio, counted, cu_seqlens)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
    if objective == "reinforce":
        policy, clipped_low, clipped_high = -advantage * logprob, low & False, high & False
    elif objective == "cispo":
        policy = -bounded.detach() * advantage * logprob
        clipped_low, clipped_high = low & (advantage != 0), high & (advantage != 0)
    else:
        policy = -torch.minimum(ratio * advantage, bounded * advantage)
        clipped_low, clipped_high = low & (advantage < 0), high & (advantage > 0)

    ref_difference = values("ref_logprobs", ref_logprobs) - logprob
    kl = ref_difference.exp() - ref_difference - 1
    old_kl = token_log_ratio.exp() - token_log_ratio - 1
    per_token = policy + kl_coef * kl - entropy_coef * entropy
    loss = (weights * per_token).sum() * _inverse_normalizer(weights, normalizer)
    sums = [(counted * x).sum() for x in (entropy, kl, old_kl, ratio)]
    largest = torch.cat([(counted * log_ratio.abs()), log_ratio.new_zeros(1)]).max()
    counts = torch.stack([(counted & x).sum() for x in (counted, clipped_low, clipped_high)])
    return loss, counts, torch.stack([*sums, largest]).detach()


def _sequence_means(values: Tensor, counted: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The mean over the counted rows of each row's sequence, in every row."""
    rows = torch.arange(len(values), device=values.device)
    offsets = cu_seqlens.long()
    ordered = (offsets[:1] == 0).all() & (offsets.diff() >= 0).all() & (offsets[-1] <= len(values))
    _require(ordered[None], "cu_seqlens", offsets[-1:], f"offsets from 0, never decreasing, up to {len(values)}")
    _require(~counted | (rows < offsets[-1]), "cu_seqlens", rows, "every row that counts inside a document")
    sequence = torch.bucketize(rows, offsets, right=True)
    lengths = values.new_zeros(len(offsets) + 1).index_add(0, sequence, counted.to(values.dtype))
    sums = values.new_zeros(len(offsets) + 1).index_add(0, sequence, values * counted)
    return (sums / lengths.clamp(min=1))[sequence]


def _weights(
    hidden: Tensor, lm_head: Tensor, targets: Tensor, token_weights: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Weights, 0 in ignored rows, and which rows count."""
    dtype = compute_dtype(hidden)
    weights = torch.ones_like(targets, dtype=dtype) if token_weights is None else token_weights.to(dtype)
    kept = targets != ignore_index
    _require((weights >= 0) & weights.isfinite(), "token_weights", weights, "a finite weight >= 0")
    _require_targets(targets, kept, lm_head.shape[0])
    counted = kept & (weights != 0)
    return weights * counted, counted


def _inverse_normalizer(weights: Tensor, normalizer: Tensor | None) -> Tensor:
    total = weights.sum() if normalizer is None else normalizer.to(weights.dtype).reshape(())
    _require(((total >= 0) & total.isfinite())[None], "normalizer", total[None], "a finite number >= 0")
    return torch.where(total > 0, 1 / total, torch.zeros_like(total))


def _logits(hidden: Tensor, lm_head: Tensor, rows: Tensor, softcap: float | None) -> Tensor:
    dtype = compute_dtype(hidden)
    # Rows that do not count are zeroed before the matmul: whatever they hold, they reach neither value nor gradient.
    logits = hidden.to(dtype).masked_fill(~rows[:, None], 0) @ lm_head.to(dtype).T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _require_targets(targets: Tensor, kept: Tensor, vocab: int) -> None:
    _require(~kept | ((targets >= 0) & (targets < vocab)), "targets", targets, f"0 <= target < {vocab} or ignore_index")


def _require_bound(counted: Tensor, bound: int | None) -> None:
    if bound is not None:
        given = torch.full((1,), bound, device=counted.device)
        _require(counted.sum() <= given, "counted_rows", given, "at least the number of rows that count")


def _require(ok: Tensor, argument: str, values: Tensor, expected: str) -> None:
    # Naming the row reads the values, which eager CPU code may do; elsewhere the check runs without waiting for it.
    if ok.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(ok.all(), f"{argument}: expected {expected} in every row")
    elif not ok.all():
        row = int(ok.long().argmin())
        raise ValueError(f"{argument}: got {values[row].item()} in row {row}, expected {expected}")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates the pairs `(x[i], x[i + d/2])` of every head by the token's angles."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.to(compute_dtype(x)).chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`."""
    wide = gate.to(compute_dtype(gate))
    activated = F.silu(wide) if activation == "silu" else F.gelu(wide, approximate="tanh")
    return (activated * up.to(wide.dtype)).to(gate.dtype)


def dropout_factors(shape: tuple[int, ...], p: float, seed: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies each element by: 0 with probability p, else 1 / (1 - p).

    Element e of the flattened tensor takes word e % 4 of Philox4x32-10 (Salmon et al., SC 2011) with the 64-bit `seed`
    as key and the counter (e // 4 as two words, stream, 0); it is kept when the word is at least round(p * 2^32), which
    counts as 2^32 - 1 at most.

    Args:
        shape: of the result.
        p: in [0, 1).
        seed: int64 scalar.
        stream: tells apart the masks that share a seed: the index of the projection.
        dtype: of the result.
    """
    low = 0xFFFFFFFF

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        # High and low word of the 64-bit product of two 32-bit words, without leaving the range of int64.
        upper, lower = a * (b >> 16), a * (b & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & low

    elements = math.prod(shape)
    block = torch.arange((elements + 3) // 4, dtype=torch.int64, device=seed.device)
    c = [block & low, block >> 32, torch.full_like(block, stream), torch.zeros_like(block)]
    key = [seed.reshape(()) & low, (seed.reshape(()) >> 32) & low]
    for _ in range(10):
        (high0, low0), (high2, low2) = multiply(0xD2511F53, c[0]), multiply(0xCD9E8D57, c[2])
        c = [high2 ^ c[1] ^ key[0], low2, high0 ^ c[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    kept = torch.stack(c, dim=1).reshape(-1)[:elements] >= min(round(p * 2**32), low)
    return (kept.to(dtype) / (1 - p)).reshape(shape)


def lora_linear(
    x: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    dropout_p: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, ...]:
    """`y_i = x W_i^T + s_i B_i^T + bias_i`, `s_i = scaling_i * dropout_i(x) A_i^T`; A, B, s rounded to x's dtype."""
    wide = x.to(compute_dtype(x))

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.to(x.dtype).to(wide.dtype)

    outputs = []
    for i, (weight, a, b, bias) in enumerate(zip(weights, lora_a, lora_b, biases, strict=True)):
        dropped = wide
        if dropout_seed is not None:
            dropped = wide * dropout_factors(tuple(x.shape), dropout_p, dropout_seed, i, wide.dtype)
        s = rounded(scalings[i] * (dropped @ rounded(a).T))
        y = wide @ weight.to(wide.dtype).T + s @ rounded(b).T
        outputs.append((y if bias is None else y + bias.to(wide.dtype)).to(x.dtype))
    return tuple(outputs)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    window: int | None,
    softcap: float | None,
    scale: float,
    parents: Tensor | None = None,
) -> Tensor:
    """`softmax(mask(cap(scale * q k^T))) v` inside each document, one at a time, behind its ancestors' keys."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] > q.shape[0] or any(begin > end for begin, end in pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens: got {bounds}, expected offsets that start at 0, never decrease and end at most at "
            f"{q.shape[0]}, the number of tokens"
        )
    continued = [-1] * (len(bounds) - 1) if parents is None else parents.tolist()
    for document, parent in enumerate(continued):
        if not -1 <= parent < document:
            raise ValueError(f"parents: got {parent} at index {document}, expected -1, or a document before {document}")
    # The extra empty document keeps the result differentiable when there is no other.
    outputs = [torch.zeros_like(q[:0])]
    keys: list[tuple[Tensor, Tensor]] = []  # what a document sees
    for (begin, end), parent in zip(pairwise(bounds), continued, strict=True):
        q_doc, k_doc, v_doc = (x[begin:end].to(compute_dtype(q)) for x in (q, k, v))
        if parent >= 0:
            k_doc, v_doc = (torch.cat(pair) for pair in zip(keys[parent], (k_doc, v_doc), strict=True))
        keys.append((k_doc, v_doc))
        outputs.append(_attend(q_doc, k_doc, v_doc, causal, window, softcap, scale).to(q.dtype))
    outputs.append(torch.zeros_like(q[bounds[-1] :]))
    return torch.cat(outputs)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, window: int | None, softcap: float | None, scale: float
) -> Tensor:
    """The queries belong to the last of the keys."""
    length, heads, d = q.shape
    # Query head h reads key/value head h // group.
    grouped = q.view(length, k.shape[1], heads // k.shape[1], d)
    logits = torch.einsum("ihgd,jhd->hgij", grouped, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    position = torch.arange(k.shape[0], device=q.device)
    distance = position[k.shape[0] - length :, None] - position
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    probabilities = torch.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1)
    return torch.einsum("hgij,jhd->ihgd", probabilities, v).reshape(length, heads, d)


def frozen_linear(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    """Plain-torch definition of kernels/frozen_linear.py."""
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    window: int | None,
    softcap: float | None,
    scale: float,
) -> Tensor:
    """Plain-torch definition of kernels/decode_attention.py, without a loop over the sequences: it runs on GPUs."""
    count, kv_heads, wide = q.shape[0], keys.shape[1], compute_dtype(q)
    # The query heads that share a key head stand where a prompt's tokens would: no copies of the keys.
    queries = q.reshape(count, kv_heads, -1, q.shape[2]).to(wide)
    logits = queries @ keys[:count].to(wide).transpose(2, 3) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    index = torch.arange(keys.shape[2], device=q.device)
    visible = index < lengths[:, None]
    if window is not None:
        visible &= index >= lengths[:, None] - window
    visible = visible[:, None, None]
    probabilities = torch.softmax(logits.masked_fill(~visible, -torch.inf), dim=-1)
    # Masked places enter the product with probability 0, and 0 * NaN would be NaN.
    seen = values[:count].to(wide).masked_fill(~visible.transpose(2, 3), 0.0)
    return (probabilities @ seen).reshape(q.shape).to(q.dtype)


def linear_argmax(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """Plain-torch definition of kernels/linear_argmax.py."""
    # max takes the first of equals, as argmax does, and is several times faster in bfloat16.
    return F.linear(hidden, lm_head).max(dim=-1).indices


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Square root of the sum of squares, summed in float64."""
    total = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
    return total.sqrt().to(max(map(compute_dtype, gradients), key=lambda dtype: dtype.itemsize))


def adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avg: list[Tensor],
    exp_avg_sq: list[Tensor],
    steps: Tensor,
    rounded: list[Tensor],
    lr_scales: Tensor,
    weight_decays: Tensor,
    learning_rate: float,
    learning_rate_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    norm: Tensor | None,
    max_norm: float,
) -> None:
    """AdamW as in kernels/adamw.py; tensors of bools stand for gradients and rounded tensors that are not there."""
    rate = learning_rate if learning_rate_tensor is None else learning_rate_tensor.double()
    clip = 1.0 if norm is None else (max_norm / (norm.double() + 1e-6)).clamp(max=1.0)
    for i, (p, gradient, m, v) in enumerate(zip(parameters, gradients, exp_avg, exp_avg_sq, strict=True)):
        if gradient.dtype == torch.bool:
            continue
        steps[i] += 1
        step, eta = steps[i].double(), rate * lr_scales[i].double()
        g = gradient.to(p.dtype) * clip
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.mul_(1 - eta * weight_decays[i].double())
        p.sub_(eta / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps))
        if rounded and rounded[i].dtype != torch.bool:
            rounded[i].copy_(p)
