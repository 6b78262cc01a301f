"""What the losses over a linear head share: argument checks, shapes for the fakes, a rule of the backward.

On GPUs they keep dhead in float32, the sum over chunks; the backward rounds it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import register_op
from .registry import cuda_reasons, triton_reasons

MAX_CLUSTER = 8  # blocks that every GPU with clusters runs together
BLOCK_BYTES = 64 * 1024  # of a row in a block, where MAX_CLUSTER blocks are enough
SHARED_BESIDE_ROW = 16 * 1024  # of a block, for its inbox and sums: see csrc/cuda/logit_rows.cuh


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


def check_temperature(temperature: float) -> None:
    """Checks what the logits are divided by."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature: got {temperature}, expected a finite number > 0")


def check_token_values(argument: str, values: Tensor | None, tokens: int) -> None:
    """Checks an optional float32 vector with one value per token that no gradient flows into."""
    if values is None:
        return
    if values.shape != (tokens,) or values.dtype != torch.float32:
        raise ValueError(f"{argument}: got {values.dtype} {list(values.shape)}, expected float32 [{tokens}]")
    if values.requires_grad:
        raise ValueError(f"{argument}: got a tensor that requires grad, expected one that does not; detach it")


def check_counted_rows(counted_rows: int | None) -> None:
    """Checks a bound for the number of rows that count."""
    if counted_rows is not None and counted_rows < 0:
        raise ValueError(f"counted_rows: got {counted_rows}, expected a number of rows, or None")


def head_triton_reasons(*tensors: Tensor) -> list[str]:
    """What keeps the Triton kernels of these losses from taking the tensors."""
    reasons = triton_reasons(*tensors)
    if any(tensor.dtype == torch.float16 for tensor in tensors):
        reasons.append("takes float32 and bfloat16, got torch.float16: a token's gradient would underflow")
    return reasons


def head_cuda_reasons(hidden: Tensor, lm_head: Tensor) -> list[str]:
    """What keeps the CUDA row kernel, and the Triton kernels around it, from taking the tensors."""
    reasons = [*cuda_reasons(hidden, lm_head), *head_triton_reasons(hidden, lm_head)]
    if hidden.device.type == "cuda":
        capability = torch.cuda.get_device_capability(hidden.device)
        if capability < (9, 0):
            reasons.append(f"needs clusters of thread blocks: compute capability 9.0 or later, got {capability}")
        properties = torch.cuda.get_device_properties(hidden.device)
        # The attribute is missing from torch's type stubs.
        shared = getattr(properties, "shared_memory_per_block_optin", 99 * 1024) - SHARED_BESIDE_ROW
        vocab = lm_head.shape[0]
        if block_bytes(vocab, cluster_blocks(vocab)) > shared:
            reasons.append(
                f"keeps a row in the shared memory of {MAX_CLUSTER} blocks of {shared} bytes, got vocab {vocab}"
            )
    return list(dict.fromkeys(reasons))


def cluster_blocks(vocab: int) -> int:
    """Thread blocks that share a row of float32 logits: so many that two blocks fit a multiprocessor, at most 8."""
    blocks = 1
    while blocks < MAX_CLUSTER and block_bytes(vocab, blocks) > BLOCK_BYTES:
        blocks *= 2
    return blocks


def block_bytes(vocab: int, blocks: int) -> int:
    """Of a row's logits in each of `blocks`."""
    return 16 * -(-vocab // (4 * blocks))


def normalizer_tensor(normalizer: Tensor | float | None, hidden: Tensor) -> Tensor | None:
    """The normalizer as a one-element tensor in the dtype that `hidden` is computed in; None stays None."""
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


def fake_gradients(hidden: Tensor, lm_head: Tensor, need_dhidden: bool, need_dhead: bool) -> tuple[Tensor, Tensor]:
    """Shapes of dhidden and dhead, empty where they are not asked for."""
    return hidden.new_empty(hidden.shape if need_dhidden else (0,)), lm_head.new_empty(
        lm_head.shape if need_dhead else (0,)
    )


def refuse_double_backward(op: str) -> None:
    """Raises instead of returning second derivatives that leave out the op's own."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: got a backward with create_graph=True, expected a first derivative only")


def register_loss(name: str, fake: Callable[..., Any], *, gpu: str | None = None) -> None:
    """Fake and autograd of an op whose last two inputs ask for dhidden and dhead and whose last two outputs are these.

    They are the gradients of the first output, a scalar; the backward only multiplies by its upstream gradient.
    """

    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[-2:])
        ctx.needs, ctx.inputs, ctx.dtype = inputs[-2:], len(inputs), inputs[0].dtype

    def backward(_ops, ctx, dloss: Tensor, *_):  # type: ignore[no-untyped-def]
        refuse_double_backward(name)
        gradients = [
            _scaled(g, dloss, ctx.dtype) if need else None for g, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
        ]
        return *gradients, *[None] * (ctx.inputs - 2)

    def float32_dhead(*inputs: Any) -> tuple[Tensor, ...]:
        *outputs, dhead = fake(*inputs)
        return *outputs, dhead.new_empty(dhead.shape, dtype=torch.float32)

    def either(*inputs: Any) -> tuple[Tensor, ...]:
        return (fake if inputs[0].device.type == "cpu" else float32_dhead)(*inputs)

    register_op(name, either, backward, setup_context, gpu=gpu, gpu_fake=float32_dhead)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    if gradient.dtype == dtype:
        return torch.ops.forge.scaled(gradient, factor) if gradient.device.type == "cpu" else gradient * factor
    # One pass and one rounding: `(gradient * factor).to(dtype)` would write a float32 copy of the head first.
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


register_op("scaled", lambda x, factor: torch.empty_like(x))
