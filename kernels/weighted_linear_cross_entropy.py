"""Weighted cross-entropy of a linear head, per-source statistics included, without the full logits."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .library import implement_on_gpu
from .linear_head import (
    check_counted_rows,
    check_linear_head,
    check_token_values,
    fake_gradients,
    head_cuda_reasons,
    head_triton_reasons,
    normalizer_tensor,
    register_loss,
)
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
    counted_rows: int | None = None,
    backend: str = "auto",
) -> MixingLoss:
    """Cross-entropy of `softmax(hidden @ lm_head.T)` with a weight per token, summed per data source on the way.

    With z = hidden @ lm_head.T (softcapped: c * tanh(z / c)), Z = logsumexp(z), nll = Z - z[target]:

        loss = sum_i w_i * ((1 - e) * nll_i + e * (Z_i - mean(z_i)) + z_loss * Z_i^2) / normalizer

    e is `label_smoothing` as in torch.nn.functional.cross_entropy (Szegedy et al., arXiv 1512.00567), the z-loss that
    of PaLM (arXiv 2204.02311). Computed in float32 (float64 for float64 inputs). Rows that are ignored or have weight
    zero do not reach any matmul and get zero gradients. Differentiable once.
    All but "reference" compute the gradients together with the loss: call them under no_grad where none is wanted.

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
        counted_rows: a bound for the number of rows that count, where the caller knows one without asking the GPU: the
            matmuls of "cuda" and "triton" then go over that many rows only, instead of all. It fails where more count.
        backend: "auto" tries "cpp" (CPU), "cuda" (GPU from compute capability 9.0), "triton" (GPU; all of them one pass
            over chunks of rows, no full logits; "cuda" is "triton" but for its row kernel), then "reference".

    Returns:
        MixingLoss: the loss (float32) and the statistics per source.

    Raises:
        ValueError: shapes or dtypes do not match, a target, source id, weight or the normalizer is out of range (the
            message names the row), or the named backend cannot take the inputs.
    """
    tokens = check_linear_head(hidden, lm_head, targets, softcap)
    check_token_values("token_weights", token_weights, tokens)
    if source_ids is not None and (source_ids.shape != (tokens,) or source_ids.dtype != torch.int32):
        raise ValueError(f"source_ids: got {source_ids.dtype} {list(source_ids.shape)}, expected int32 [{tokens}]")
    if num_sources < 1:
        raise ValueError(f"num_sources: got {num_sources}, expected at least 1")
    if not (z_loss >= 0 and math.isfinite(z_loss)):
        raise ValueError(f"z_loss: got {z_loss}, expected a finite number >= 0")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, expected 0 <= label_smoothing <= 1")
    check_counted_rows(counted_rows)
    total = normalizer_tensor(normalizer, hidden)
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
            counted_rows=counted_rows,
        )
    )


def _run(
    ops: Any, hidden: Tensor, lm_head: Tensor, *rest: Tensor | float | None, counted_rows: int | None
) -> tuple[Tensor, ...]:
    *options, softcap, z_loss, label_smoothing = rest
    grad = torch.is_grad_enabled()
    return ops.weighted_linear_cross_entropy(
        hidden,
        lm_head,
        *options,
        counted_rows,
        softcap or 0.0,
        z_loss,
        label_smoothing,
        grad and hidden.requires_grad,
        grad and lm_head.requires_grad,
    )[:5]


OP.register("cpp", partial(_run, torch.ops.forge), cpp_reasons)
OP.register("cuda", partial(_run, torch.ops.forge), head_cuda_reasons)
OP.register("triton", partial(_run, torch.ops.forge_triton), head_triton_reasons)
OP.register("reference", reference.weighted_linear_cross_entropy, no_reasons)


def _fake(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    source_ids: Tensor | None,
    num_sources: int,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(num_sources, dtype=torch.float32),
        hidden.new_empty(num_sources, dtype=torch.float32),
        hidden.new_empty(num_sources, dtype=torch.int64),
        hidden.new_empty(num_sources, dtype=torch.int64),
        *fake_gradients(hidden, lm_head, *rest[-2:]),
    )


register_loss("weighted_linear_cross_entropy", _fake, gpu="weighted_linear_cross_entropy")

implement_on_gpu("weighted_linear_cross_entropy", "weighted_linear_cross_entropy", cuda_rows=True)
