"""Residual addition and the root-mean-square norm after it, in one pass."""

from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import register_op
from .registry import Op, cpp_reasons, cuda_reasons, no_reasons, triton_reasons
from .rms_norm import check_weight

OP = Op("add_rms_norm")


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Adds the output of a block to the residual stream and norms the sum: `rms_norm(x + residual)` and `x + residual`.

    The sum is rounded to the dtype of x before it is normed, as by an addition of its own; see `rms_norm` for the norm.
    On a GPU the fused kernel moves 8 tensors forward and backward where addition, norm and the addition of their
    gradients move 11.

    Args:
        x: [..., d], float32, bfloat16, float16 or float64: what the block adds.
        residual: shape and dtype of x: the residual stream.
        weight: [d], dtype of x.
        eps: added to the mean square; > 0.
        weight_offset: 0 for most models, 1 for those that store the weight minus one (Gemma).
        backend: "auto" tries "cpp" (CPU), "triton" and "cuda" (GPU), then "reference". Only "triton" is fused; "cpp"
            and "cuda" add and then call the op of rms_norm.

    Returns:
        The normed sum and the sum, both [..., d] in the dtype of x.

    Raises:
        ValueError: shapes or dtypes do not match, or the named backend cannot take the inputs.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"residual: got {residual.dtype} of shape {list(residual.shape)}, expected {x.dtype} of {list(x.shape)}, "
            "as x"
        )
    check_weight(x, weight)
    return OP.select(backend, x, residual, weight)(x, residual, weight, eps, weight_offset)


def _run_unfused(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch.ops.forge.rms_norm(total, weight, eps, weight_offset)[0], total


def _run_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    return torch.ops.forge_triton.add_rms_norm(x, residual, weight, eps, weight_offset)[:2]


OP.register("cpp", _run_unfused, cpp_reasons)
OP.register("triton", _run_triton, triton_reasons)
OP.register("cuda", _run_unfused, cuda_reasons)
OP.register("reference", reference.add_rms_norm, no_reasons)


def _fake(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    y, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return y, total, x.new_empty(x.numel() // x.shape[-1] if x.shape[-1] else 0, dtype=torch.float32)


def _fake_backward(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(total, memory_format=torch.contiguous_format)
    return dx, weight.new_empty(weight.shape if need_dweight else (0,))


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, weight, _, ctx.weight_offset = inputs
    ctx.save_for_backward(output[1], weight, output[2])


def _backward(ops: Any, ctx, dy: Tensor, dtotal: Tensor, _drstd: Tensor):  # type: ignore[no-untyped-def]
    total, weight, rstd = ctx.saved_tensors
    need_dweight = ctx.needs_input_grad[2]
    dx, dweight = ops.add_rms_norm_backward(dy, dtotal, total, weight, rstd, ctx.weight_offset, need_dweight)
    return dx, dx, dweight if need_dweight else None, None, None


register_op(
    "add_rms_norm",
    _fake,
    _backward,
    _setup_context,
    gpu="add_rms_norm",
    schema="(Tensor x, Tensor residual, Tensor weight, float eps, float weight_offset)"
    " -> (Tensor y, Tensor total, Tensor rstd)",
)
register_op(
    "add_rms_norm_backward",
    _fake_backward,
    gpu="add_rms_norm",
    schema="(Tensor dy, Tensor dtotal, Tensor total, Tensor weight, Tensor rstd, float weight_offset,"
    " bool need_dweight) -> (Tensor dx, Tensor dweight)",
)
