"""Log-probability and entropy of every token under a linear head, without the full logits."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import implement_on_gpu, register_op
from .linear_head import (
    check_counted_rows,
    check_linear_head,
    check_temperature,
    fake_gradients,
    head_cuda_reasons,
    head_triton_reasons,
    refuse_double_backward,
)
from .registry import Op, cpp_reasons, no_reasons

OP = Op("linear_token_logprobs")


def linear_token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    counted_rows: int | None = None,
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
        counted_rows: a bound for the number of rows that count, where the caller knows one without asking the GPU: the
            matmuls of "cuda" and "triton" then go over that many rows only, instead of all. It fails where more count.
        backend: "auto" tries "cpp" (CPU), "cuda" (GPU from compute capability 9.0), "triton" (GPU; all of them over
            chunks of rows, no full logits; "cuda" is "triton" but for its row kernel), then "reference".

    Returns:
        logprob float32 [tokens] in nats, entropy float32 [tokens] in nats.

    Raises:
        ValueError: shapes or dtypes do not match, a target is out of range (the message names the row), or the named
            backend cannot take the inputs.
    """
    check_linear_head(hidden, lm_head, targets, softcap)
    check_temperature(temperature)
    check_counted_rows(counted_rows)
    run = OP.select(backend, hidden, lm_head)
    return run(hidden, lm_head, targets, temperature, softcap, ignore_index, counted_rows=counted_rows)


def _run(ops: Any, *rest: Tensor | float | None, counted_rows: int | None) -> tuple[Tensor, Tensor]:
    *options, softcap, ignore_index = rest
    return ops.linear_token_logprobs(*options, softcap or 0.0, ignore_index, counted_rows)[:2]


OP.register("cpp", partial(_run, torch.ops.forge), cpp_reasons)
OP.register("cuda", partial(_run, torch.ops.forge), head_cuda_reasons)
OP.register("triton", partial(_run, torch.ops.forge_triton), head_triton_reasons)
OP.register("reference", reference.linear_token_logprobs, no_reasons)


def _fake(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    logprob, entropy = (hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(2))
    # Row maxima, sums of exponentials: the backward's, of those backends that do not reduce the row again.
    return logprob, entropy, hidden.new_empty((2, hidden.shape[0]), dtype=torch.float32)


def _fake_backward(
    dlogprob: Tensor, dentropy: Tensor, hidden: Tensor, lm_head: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return fake_gradients(hidden, lm_head, *rest[-2:])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    hidden, lm_head, targets, *ctx.options = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(hidden, lm_head, targets, output[1], output[2])


def _backward(ops, ctx, dlogprob: Tensor, dentropy: Tensor, _dsoftmax: Tensor):  # type: ignore[no-untyped-def]
    refuse_double_backward("linear_token_logprobs")
    need_dhidden, need_dhead = ctx.needs_input_grad[:2]
    dhidden, dhead = ops.linear_token_logprobs_backward(
        dlogprob, dentropy, *ctx.saved_tensors, *ctx.options, need_dhidden, need_dhead
    )
    return dhidden if need_dhidden else None, dhead if need_dhead else None, None, None, None, None, None


register_op("linear_token_logprobs", _fake, _backward, _setup_context, gpu="linear_token_logprobs")
register_op("linear_token_logprobs_backward", _fake_backward, gpu="linear_token_logprobs")
implement_on_gpu("linear_token_logprobs", "linear_token_logprobs", cuda_rows=True)
implement_on_gpu("linear_token_logprobs_backward", "linear_token_logprobs", cuda_rows=True)
