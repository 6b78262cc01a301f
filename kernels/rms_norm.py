"""Root-mean-square layer norm."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import register_op
from .registry import Op, cpp_reasons, cuda_reasons, no_reasons, triton_reasons

OP = Op("rms_norm")


def rms_norm(
    x: Tensor, weight: Tensor, *, eps: float = 1e-6, weight_offset: float = 0.0, backend: str = "auto"
) -> Tensor:
    """Root-mean-square layer norm over the last dimension (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    `y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)`, computed in float32 (float64 for float64 inputs) and
    rounded once.

    Args:
        x: [..., d], float32, bfloat16, float16 or float64.
        weight: [d], dtype of x.
        eps: added to the mean square; > 0.
        weight_offset: 0 for most models, 1 for those that store the weight minus one (Gemma).
        backend: "auto" tries "cpp" (CPU), "cuda" and "triton" (GPU), then "reference".

    Returns:
        [..., d], dtype of x.

    Raises:
        ValueError: shapes or dtypes do not match, or the named backend cannot take the inputs.
    """
    check_weight(x, weight)
    return OP.select(backend, x, weight)(x, weight, eps, weight_offset)


def check_weight(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless weight is [d] for x [..., d], in the dtype of x."""
    if weight.dim() != 1 or x.dim() == 0 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"weight: got shape {list(weight.shape)} with x of shape {list(x.shape)}, expected [d] for x [..., d]"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"weight: got {weight.dtype}, expected the dtype of x, {x.dtype}")


def _run(ops: Any, x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    return ops.rms_norm(x, weight, eps, weight_offset)[0]


OP.register("cpp", partial(_run, torch.ops.forge), cpp_reasons)
OP.register("cuda", partial(_run, torch.ops.forge), cuda_reasons)
OP.register("triton", partial(_run, torch.ops.forge_triton), triton_reasons)
OP.register("reference", reference.rms_norm, no_reasons)


def _fake(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        x.numel() // x.shape[-1] if x.shape[-1] else 0, dtype=torch.float32
    )


def _fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape if need_dweight else (0,))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, ctx.weight_offset = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ops, ctx, dy: Tensor, _drstd: Tensor):  # type: ignore[no-untyped-def]
    x, weight, rstd = ctx.saved_tensors
    need_dweight = ctx.needs_input_grad[1]
    dx, dweight = ops.rms_norm_backward(dy, x, weight, rstd, ctx.weight_offset, need_dweight)
    return dx, dweight if need_dweight else None, None, None


register_op("rms_norm", _fake, _backward, _setup_context, gpu="rms_norm")
register_op("rms_norm_backward", _fake_backward, gpu="rms_norm")
