"""Gated activation of the feed-forward layer."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import reference
from .library import register_op
from .registry import Op, cpp_reasons, no_reasons, triton_reasons

OP = Op("swiglu")


def swiglu(gate: Tensor, up: Tensor, *, activation: str = "silu", backend: str = "auto") -> Tensor:
    """Gated linear unit `activation(gate) * up` (Shazeer, arXiv 2002.05202, equations 5 and 6).

    Computed in float32 (float64 for float64 inputs) and rounded once.

    Args:
        gate: [...], float32, bfloat16, float16 or float64.
        up: shape and dtype of gate.
        activation: "silu" (`x * sigmoid(x)`) or "gelu_tanh" (the tanh form of GELU: Hendrycks and Gimpel,
            arXiv 1606.08415, section 2).
        backend: "auto" tries "cpp" (CPU), "triton" (GPU), then "reference".

    Returns:
        Shape and dtype of gate.

    Raises:
        ValueError: shapes or dtypes differ, the activation is unknown, or the named backend cannot take the inputs.
    """
    if up.shape != gate.shape:
        raise ValueError(f"up: got shape {list(up.shape)}, expected that of gate, {list(gate.shape)}")
    if up.dtype != gate.dtype:
        raise ValueError(f"up: got {up.dtype}, expected the dtype of gate, {gate.dtype}")
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation: got {activation!r}, expected 'silu' or 'gelu_tanh'")
    return OP.select(backend, gate, up)(gate, up, activation)


def _run(ops: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return ops.swiglu(gate, up, activation)


OP.register("cpp", partial(_run, torch.ops.forge), cpp_reasons)
OP.register("triton", partial(_run, torch.ops.forge_triton), triton_reasons)
OP.register("reference", reference.swiglu, no_reasons)


def _fake(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


def _fake_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return _fake(gate, up, activation), _fake(gate, up, activation)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ops, ctx, dy: Tensor):  # type: ignore[no-untyped-def]
    return *ops.swiglu_backward(dy, *ctx.saved_tensors, ctx.activation), None


register_op("swiglu", _fake, _backward, _setup_context, gpu="swiglu")
register_op("swiglu_backward", _fake_backward, gpu="swiglu")
