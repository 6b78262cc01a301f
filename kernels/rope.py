"""Rotary position embedding."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import register_op
from .registry import Op, Reasons, cpp_reasons, no_reasons, triton_reasons

OP = Op("rope")


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys (Su et al., arXiv 2104.09864, equation 34).

    Pair i of a head is `(x[i], x[i + d/2])`, the layout of Hugging Face checkpoints; it is rotated by the angle whose
    cosine and sine the tables hold for the token. Computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        q: [tokens, q_heads, d], d even; float32, bfloat16, float16 or float64.
        k: [tokens, kv_heads, d], dtype of q.
        cos: [tokens, d/2], float32 (float64 when q is float64).
        sin: as cos.
        backend: "auto" tries "cpp" (CPU), "triton" (GPU), then "reference".

    Returns:
        The rotated (q, k), shapes and dtype of the inputs.

    Raises:
        ValueError: shapes or dtypes do not match, or the named backend cannot take the inputs.
    """
    if q.dim() != 3 or q.shape[2] % 2:
        raise ValueError(f"q: got shape {list(q.shape)}, expected [tokens, q_heads, d] with even d")
    tokens, _, d = q.shape
    if k.dim() != 3 or k.shape[0] != tokens or k.shape[2] != d:
        raise ValueError(f"k: got shape {list(k.shape)}, expected [{tokens}, kv_heads, {d}] for q of {list(q.shape)}")
    if k.dtype != q.dtype:
        raise ValueError(f"k: got {k.dtype}, expected the dtype of q, {q.dtype}")
    table_dtype = reference.compute_dtype(q)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, d // 2):
            raise ValueError(f"{name}: got shape {list(table.shape)}, expected [{tokens}, {d // 2}]")
        if table.dtype != table_dtype:
            raise ValueError(f"{name}: got {table.dtype}, expected {table_dtype} for q of {q.dtype}")
    return OP.select(backend, q, k, cos, sin)(q, k, cos, sin)


def _run(ops: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return ops.rope(q, k, cos, sin, False)


def _reasons(tensor_reasons: Reasons, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[str]:
    reasons = tensor_reasons(q, k, cos, sin)
    if cos.requires_grad or sin.requires_grad:
        reasons.append("gives cos and sin no gradient, got tables that require one")
    return reasons


OP.register("cpp", partial(_run, torch.ops.forge), partial(_reasons, cpp_reasons))
OP.register("triton", partial(_run, torch.ops.forge_triton), partial(_reasons, triton_reasons))
OP.register("reference", reference.rope, no_reasons)


def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ops, ctx, dq: Tensor, dk: Tensor):  # type: ignore[no-untyped-def]
    # The transpose of a rotation is the rotation by the opposite angle: the op is its own backward.
    dq, dk = ops.rope(dq, dk, *ctx.saved_tensors, not ctx.inverse)
    return dq, dk, None, None, None


register_op("rope", _fake, _backward, _setup_context, gpu="rope")
