"""Log-probability and entropy of every token under a linear head, without the full logits."""

import math

from torch import Tensor

from . import reference
from .registry import Op, no_reasons
from .weighted_linear_cross_entropy import check_linear_head

OP = Op("linear_token_logprobs")


def linear_token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and the entropy of its distribution, for any upstream gradients of both.

    The distribution of token i is `softmax(z_i / temperature)` with z = hidden @ lm_head.T, softcapped before the
    temperature: c * tanh(z / c). Computed in float32 (float64 for float64 inputs); the backward computes the logits
    again instead of keeping them. Differentiable once.

    Args:
        hidden: [tokens, hidden], after the final norm.
        lm_head: [vocab, hidden], dtype of hidden; no gradient is computed for a frozen head.
        targets: int64 [tokens], below vocab or `ignore_index`.
        temperature: > 0; divides the logits.
        softcap: c > 0 of the logits' softcap, None for no softcap.
        ignore_index: rows with this target cost no matmul, give 0 twice and get zero gradients.
        backend: "auto" tries "reference".

    Returns:
        logprob float32 [tokens] in nats, entropy float32 [tokens] in nats.

    Raises:
        ValueError: shapes or dtypes do not match, a target is out of range (the message names the row), or the named
            backend cannot take the inputs.
    """
    check_linear_head(hidden, lm_head, targets, softcap)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, expected a finite number > 0")
    run = OP.select(backend, hidden, lm_head)
    return run(hidden, lm_head, targets, temperature, softcap, ignore_index)


OP.register("reference", reference.linear_token_logprobs, no_reasons)
