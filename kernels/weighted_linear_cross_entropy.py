"""Weighted cross-entropy of a linear head, per-source statistics included, without the full logits."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .registry import Op, cpp_reasons, no_reasons

OP = Op("weighted_linear_cross_entropy")


class MixingLoss(NamedTuple):
    """A loss and what each data source contributed to it; `loss` alone is differentiable.

    A token counts when its target is not `ignore_index` and its weight is not zero; S is `num_sources`.
    """

    loss: Tensor  # scalar float32
    weighted_nll: Tensor  # [S] float32, sum of weight * nll: plain negative log-likelihood, no smoothing, no z-loss
    weight_sum: Tensor  # [S] float32
    token_count: Tensor  # [S] int64
    correct: Tensor  # [S] int64, tokens whose target has the largest logit (the first one in a tie)


def weighted_linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    token_weights: Tensor | None = None,
    *,
    source_ids: Tensor | None = None,
    num_sources: int = 1,
    normalizer: Tensor | float | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    backend: str = "auto",
) -> MixingLoss:
    """Cross-entropy of `softmax(hidden @ lm_head.T)` with a weight per token, summed per data source on the way.

    With z = hidden @ lm_head.T (softcapped: c * tanh(z / c)), Z = logsumexp(z), nll = Z - z[target]:

        loss = sum_i w_i * ((1 - e) * nll_i + e * (Z_i - mean(z_i)) + z_loss * Z_i^2) / normalizer

    e is `label_smoothing` as in torch.nn.functional.cross_entropy (Szegedy et al., arXiv 1512.00567), the z-loss that
    of PaLM (arXiv 2204.02311). Computed in float32 (float64 for float64 inputs). Rows that are ignored or have weight
    zero do not reach any matmul and get zero gradients. Differentiable once.
    "cpp" computes the gradients together with the loss, so call it under no_grad where they are not wanted.

    Args:
        hidden: [tokens, hidden], after the final norm.
        lm_head: [vocab, hidden], dtype of hidden; no gradient is computed for a frozen head.
        targets: int64 [tokens], below vocab or `ignore_index`.
        token_weights: float32 [tokens], finite and >= 0; None is all ones. Not differentiable: detach it.
        source_ids: int32 [tokens], 0 <= id < num_sources in every row that counts; None is source 0.
        num_sources: length S of the statistics.
        normalizer: number or one-element tensor >= 0 that the sum is divided by, e.g. the weight of the whole global
            batch; None is the sum of the weights of the rows that count. Where it is 0 (nothing counts) the loss and
            all gradients are 0.
        ignore_index: targets with this value do not count.
        softcap: c > 0 of the logits' softcap, None for no softcap.
        z_loss: factor of the squared logsumexp, >= 0.
        label_smoothing: e, 0 <= e <= 1.
        backend: "auto" tries "cpp" (CPU; one pass over chunks of rows, no full logits), then "reference".

    Returns:
        MixingLoss: the loss (float32) and the statistics per source.

    Raises:
        ValueError: shapes or dtypes do not match, a target, source id, weight or the normalizer is out of range (the
            message names the row), or the named backend cannot take the inputs.
    """
    tokens = check_linear_head(hidden, lm_head, targets, softcap)
    if token_weights is not None:
        if token_weights.shape != (tokens,) or token_weights.dtype != torch.float32:
            raise ValueError(
                f"token_weights: got {token_weights.dtype} {list(token_weights.shape)}, expected float32 [{tokens}]"
            )
        if token_weights.requires_grad:
            raise ValueError("token_weights: got a tensor that requires grad, expected one that does not; detach it")
    if source_ids is not None and (source_ids.shape != (tokens,) or source_ids.dtype != torch.int32):
        raise ValueError(f"source_ids: got {source_ids.dtype} {list(source_ids.shape)}, expected int32 [{tokens}]")
    if num_sources < 1:
        raise ValueError(f"num_sources: got {num_sources}, expected at least 1")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss: got {z_loss}, expected a finite number >= 0")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected 0 <= label_smoothing <= 1")
    total = _normalizer_tensor(normalizer, hidden)
    run = OP.select(backend, hidden, lm_head)
    return MixingLoss(
        *run(
            hidden,
            lm_head,
            targets,
            token_weights,
            source_ids,
            num_sources,
            total,
            ignore_index,
            softcap,
            z_loss,
            label_smoothing,
        )
    )


def check_linear_head(hidden: Tensor, lm_head: Tensor, targets: Tensor, softcap: float | None) -> int:
    """Checks what all losses over a linear head have in common; returns the number of tokens."""
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden: got {hidden.dtype} {list(hidden.shape)}, expected floating point [tokens, hidden]")
    if lm_head.dim() != 2 or lm_head.shape[1] != hidden.shape[1] or lm_head.shape[0] < 1:
        raise ValueError(
            f"lm_head: got shape {list(lm_head.shape)}, expected [vocab, {hidden.shape[1]}] with vocab at least 1, "
            f"for hidden of shape {list(hidden.shape)}"
        )
    if lm_head.dtype != hidden.dtype:
        raise ValueError(f"lm_head: got {lm_head.dtype}, expected the dtype of hidden, {hidden.dtype}")
    tokens = hidden.shape[0]
    if targets.shape != (tokens,) or targets.dtype != torch.int64:
        raise ValueError(f"targets: got {targets.dtype} {list(targets.shape)}, expected int64 [{tokens}]")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: got {softcap}, expected a number > 0, or None for no softcap")
    return tokens


def _normalizer_tensor(normalizer: Tensor | float | None, hidden: Tensor) -> Tensor | None:
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        if not (normalizer >= 0 and math.isfinite(normalizer)):
            raise ValueError(f"normalizer: got {normalizer}, expected a finite number >= 0")
        return torch.full((), normalizer, dtype=reference.compute_dtype(hidden), device=hidden.device)
    if normalizer.numel() != 1:
        raise ValueError(f"normalizer: got a tensor of shape {list(normalizer.shape)}, expected one element")
    if normalizer.requires_grad:
        raise ValueError("normalizer: got a tensor that requires grad, expected one that does not; detach it")
    return normalizer


def _run_compiled(
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
) -> tuple[Tensor, ...]:
    grad = torch.is_grad_enabled()
    return torch.ops.forge.weighted_linear_cross_entropy(
        hidden,
        lm_head,
        targets,
        token_weights,
        source_ids,
        num_sources,
        normalizer,
        ignore_index,
        softcap or 0.0,
        z_loss,
        label_smoothing,
        grad and hidden.requires_grad,
        grad and lm_head.requires_grad,
    )[:5]


OP.register("cpp", _run_compiled, cpp_reasons)
OP.register("reference", reference.weighted_linear_cross_entropy, no_reasons)


@torch.library.register_fake("forge::weighted_linear_cross_entropy")
def _fake(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    source_ids: Tensor | None,
    num_sources: int,
    normalizer: Tensor | None,
    ignore_index: int,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    need_dhidden: bool,
    need_dhead: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(num_sources, dtype=torch.float32),
        hidden.new_empty(num_sources, dtype=torch.float32),
        hidden.new_empty(num_sources, dtype=torch.int64),
        hidden.new_empty(num_sources, dtype=torch.int64),
        *fake_gradients(hidden, lm_head, need_dhidden, need_dhead),
    )


def fake_gradients(hidden: Tensor, lm_head: Tensor, need_dhidden: bool, need_dhead: bool) -> tuple[Tensor, Tensor]:
    """Shapes of dhidden and dhead, empty where they are not asked for."""
    return hidden.new_empty(hidden.shape if need_dhidden else (0,)), lm_head.new_empty(
        lm_head.shape if need_dhead else (0,)
    )


def refuse_double_backward(op: str) -> None:
    """Raises instead of returning second derivatives that leave out the op's own."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: got a backward with create_graph=True, expected a first derivative only")


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[5], output[6])
    ctx.needs = inputs[11:]


def _backward(ctx, dloss: Tensor, *_):  # type: ignore[no-untyped-def]
    refuse_double_backward("weighted_linear_cross_entropy")
    gradients = [g * dloss if need else None for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True)]
    return *gradients, *[None] * 11


torch.library.register_autograd("forge::weighted_linear_cross_entropy", _backward, setup_context=_setup_context)
