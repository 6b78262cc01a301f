"""Linear layers with frozen weights that share one input."""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import quantized, reference
from .library import register_op
from .registry import Op, cpp_reasons, no_reasons

OP = Op("frozen_linear")


def frozen_linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None] | None = None, *, backend: str = "auto"
) -> tuple[Tensor, ...]:
    """`y_i = x weights_i^T + biases_i` with one gradient of x for all; no weight or bias gets a gradient.

    On a CPU with AVX512-BF16 a batch of a few tokens reads every weight once, where it lies: made for decoding.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        weights: one [out_i, in] per layer, dtype of x. Quantised ones (see lora_linear) are made dense for each matmul.
        biases: one [out_i] or None per layer, dtype of x; None for no biases at all.
        backend: "auto" tries "cpp" (CPU), then "reference".

    Returns:
        One [..., out_i] per layer, dtype of x.

    Raises:
        ValueError: shapes, dtypes or lengths of lists do not match, a weight or bias requires a gradient while
            gradients are recorded, or the named backend cannot take the inputs.
    """
    weights, biases = [quantized.nominal(w) for w in weights], [None] * len(weights) if biases is None else list(biases)
    if not weights or len(biases) != len(weights):
        raise ValueError(f"biases: got {len(biases)} entries, expected one per weight, {len(weights)} (at least one)")
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"weights[{i}]: got shape {list(weight.shape)} with x of {list(x.shape)}, expected [out, in]"
            )
        if bias is not None and tuple(bias.shape) != (weight.shape[0],):
            raise ValueError(f"biases[{i}]: got shape {list(bias.shape)}, expected [{weight.shape[0]}]")
        for name, tensor in (("weights", weight), ("biases", bias)):
            if tensor is None:
                continue
            if tensor.dtype != x.dtype:
                raise ValueError(f"{name}[{i}]: got {tensor.dtype}, expected the dtype of x, {x.dtype}")
            if tensor.requires_grad and torch.is_grad_enabled():
                raise ValueError(
                    f"{name}[{i}]: requires a gradient, which frozen_linear does not compute; use "
                    f"torch.nn.functional.linear, or freeze it with requires_grad_(False)"
                )
    rows = x.reshape(-1, x.shape[-1])
    run = OP.select(backend, rows, weights, biases)
    if any(map(quantized.is_quantized, weights)):
        outputs = quantized.frozen(run, _dx, rows, weights, biases)
    else:
        outputs = run(rows, weights, biases)
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)


def _run_cpp(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[Tensor]:
    given = []
    if any(bias is not None for bias in biases):
        given = [x.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return torch.ops.forge.frozen_linear(x, weights, given)


def _dx(dys: list[Tensor], weights: list[Tensor]) -> Tensor:
    if not cpp_reasons(*dys, *weights):
        return torch.ops.forge.frozen_linear_backward(dys, weights)
    return torch.stack([dy @ weight for dy, weight in zip(dys, weights, strict=True)]).sum(0)


def _reasons(x: Tensor, weights: list[Tensor], biases: list[Tensor | None]) -> list[str]:
    return cpp_reasons(x, *weights, *biases)


OP.register("cpp", _run_cpp, _reasons)
OP.register("reference", reference.frozen_linear, no_reasons)


def _fake(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _fake_backward(dys: list[Tensor], weights: list[Tensor]) -> Tensor:
    return dys[0].new_empty(dys[0].shape[0], weights[0].shape[1])


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.weights, ctx.biases = inputs


def _backward(ops, ctx, dys: list[Tensor]):  # type: ignore[no-untyped-def]
    dx = ops.frozen_linear_backward(dys, ctx.weights) if ctx.needs_input_grad[0] else None
    return dx, [None] * len(ctx.weights), [None] * len(ctx.biases)


register_op("frozen_linear", _fake, _backward, _setup_context)
register_op("frozen_linear_backward", _fake_backward)
