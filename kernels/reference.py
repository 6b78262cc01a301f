"""One plain-torch definition per op: the oracle of every test, and the backend for any device and dtype.

Written to be read. Each runs in float64 for float64 inputs and in float32 otherwise, and rounds to the inputs' dtype
at the end.
"""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a reference computes: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension."""
    wide = x.to(compute_dtype(x))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * (weight.to(wide.dtype) + weight_offset)).to(x.dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, then per source: weighted nll, weight, counted tokens, correct tokens."""
    dtype = compute_dtype(hidden)
    weights = torch.ones_like(targets, dtype=dtype) if token_weights is None else token_weights.to(dtype)
    sources = torch.zeros_like(targets) if source_ids is None else source_ids.long()
    kept = targets != ignore_index
    counted = kept & (weights != 0)
    _require((weights >= 0) & weights.isfinite(), "token_weights", weights, "a finite weight >= 0")
    _require_targets(targets, kept, lm_head.shape[0])
    _require(~counted | ((sources >= 0) & (sources < num_sources)), "source_ids", sources, f"0 <= id < {num_sources}")

    logits = _logits(hidden, lm_head, counted, softcap)
    log_z = logits.logsumexp(-1)
    target = targets.masked_fill(~counted, 0)
    nll = log_z - logits.gather(-1, target[:, None])[:, 0]
    smoothed = (1 - label_smoothing) * nll + label_smoothing * (log_z - logits.mean(-1))
    weights = weights * counted
    total = weights.sum() if normalizer is None else normalizer.to(dtype).reshape(())
    _require(((total >= 0) & total.isfinite())[None], "normalizer", total[None], "a finite number >= 0")
    per_token = smoothed + z_loss * log_z.square()
    loss = (weights * per_token).sum() * torch.where(total > 0, 1 / total, torch.zeros_like(total))

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
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, softmax(softcapped logits / temperature)."""
    kept = targets != ignore_index
    _require_targets(targets, kept, lm_head.shape[0])
    logprobs = (_logits(hidden, lm_head, kept, softcap) / temperature).log_softmax(-1)
    logprob = logprobs.gather(-1, targets.masked_fill(~kept, 0)[:, None])[:, 0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.where(kept, logprob, 0), torch.where(kept, entropy, 0)


def _logits(hidden: Tensor, lm_head: Tensor, rows: Tensor, softcap: float | None) -> Tensor:
    dtype = compute_dtype(hidden)
    # Rows that do not count are zeroed before the matmul: whatever they hold, they reach neither value nor gradient.
    logits = hidden.to(dtype).masked_fill(~rows[:, None], 0) @ lm_head.to(dtype).T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _require_targets(targets: Tensor, kept: Tensor, vocab: int) -> None:
    _require(~kept | ((targets >= 0) & (targets < vocab)), "targets", targets, f"0 <= target < {vocab} or ignore_index")


def _require(ok: Tensor, argument: str, values: Tensor, expected: str) -> None:
    # Naming the row reads the values, which eager CPU code may do; elsewhere the check runs without waiting for it.
    if ok.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(ok.all(), f"{argument}: expected {expected} in every row")
    elif not ok.all():
        row = int(ok.long().argmin())
        raise ValueError(f"{argument}: got {values[row].item()} in row {row}, expected {expected}")
