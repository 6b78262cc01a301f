"""Rotary position embedding."""

import torch
from torch import Tensor

from . import reference
from .registry import Op, cpp_reasons, no_reasons

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
        backend: "auto" tries "cpp" (CPU), then "reference".

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


def _run_compiled(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.forge.rope(q, k, cos, sin, False)


def _reasons(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> list[str]:
    reasons = cpp_reasons(q, k, cos, sin)
    if cos.requires_grad or sin.requires_grad:
        reasons.append("gives cos and sin no gradient, got tables that require one")
    return reasons


OP.register("cpp", _run_compiled, _reasons)
OP.register("reference", reference.rope, no_reasons)


@torch.library.register_fake("forge::rope")
def _fake(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dq: Tensor, dk: Tensor):  # type: ignore[no-untyped-def]
    # The transpose of a rotation is the rotation by the opposite angle: the op is its own backward.
    dq, dk = torch.ops.forge.rope(dq, dk, *ctx.saved_tensors, not ctx.inverse)
    return dq, dk, None, None, None


torch.library.register_autograd("forge::rope", _backward, setup_context=_setup_context)
