"""Linear layer with a frozen weight and a low-rank adapter, single or grouped over one input."""

from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from . import dora, lora_linear_ops, quantized, reference
from .registry import Op, cpp_reasons, no_reasons, triton_reasons

OP = Op("lora_linear")


@overload
def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    *,
    scaling: float,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor: ...


@overload
def lora_linear(
    x: Tensor,
    weight: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    *,
    scaling: float | Sequence[float],
    bias: Sequence[Tensor | None] | None = None,
    magnitude: Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]: ...


def lora_linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    lora_a: Tensor | Sequence[Tensor],
    lora_b: Tensor | Sequence[Tensor],
    *,
    scaling: float | Sequence[float],
    bias: Tensor | Sequence[Tensor | None] | None = None,
    magnitude: Tensor | Sequence[Tensor | None] | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Linear layer plus low-rank adapter (Hu et al., arXiv 2106.09685, equation 3).

    `y = x W^T + scaling * (dropout(x) A^T) B^T + bias`. The weight is frozen: it gets no gradient. The grouped form
    takes lists for several projections of the same x (query/key/value, gate/up): x is read once for all of them and
    gets one gradient.

    Dropout masks are a function of the seed, the position of the element in x and the index of the projection only
    (Philox4x32-10): they are made again in the backward pass instead of being stored (Triton keeps one bit an element,
    except under a checkpoint), and every projection of a group has its own, as separate layers would.

    With a magnitude m the output before the bias is multiplied by `m / ||W + scaling * B A||`, norms of rows (DoRA, Liu
    et al., arXiv 2402.09353, equation 5); the norm counts as a constant in the backward pass.

    Args:
        x: [..., in], float32, bfloat16, float16 or float64.
        weight: [out, in], dtype of x; the grouped form takes a list, also for lora_a, lora_b, bias and magnitude.
            Quantised tensors whose nominal dtype is that of x (torchao's NF4, float8, int8, the Params4bit of
            bitsandbytes' Linear4bit) are made dense for the forward matmul, and again for the backward one.
        lora_a: [rank, in], dtype of x, or float32 master weights, which are rounded to the dtype of x for the matmuls
            and whose gradients are float32.
        lora_b: [out, rank], as lora_a. Ranks may differ within a group.
        scaling: factor of the adapter's product, or one per projection of a group; usually alpha / rank.
        bias: [out], dtype of x.
        magnitude: [out], dtype of x or float32; None, or None for a projection of a group: no rescaling.
        dropout_p: probability in [0, 1) with which an element of x does not reach the adapter.
        dropout_seed: int64 scalar tensor or int, required when dropout_p > 0.
        backend: "auto" tries "cpp" (CPU), "triton", then "reference".

    Returns:
        [..., out], dtype of x; a tuple of them for the grouped form.

    Raises:
        ValueError: shapes, dtypes or lengths of lists do not match, weight requires a gradient while gradients are
            recorded, or the named backend cannot take the inputs.
        ImportError: a weight of bitsandbytes without bitsandbytes.
    """
    grouped = not isinstance(weight, Tensor)
    weights, a, b = [quantized.nominal(w) for w in _as_list(weight)], _as_list(lora_a), _as_list(lora_b)
    biases = [None] * len(weights) if bias is None else _as_list(bias)
    scalings = [float(s) for s in scaling] if isinstance(scaling, Sequence) else [float(scaling)] * len(weights)
    magnitudes = [None] * len(weights) if magnitude is None else _as_list(magnitude)
    _check(x, weights, a, b, biases, scalings, magnitudes, grouped)
    seed = _checked_seed(dropout_p, dropout_seed, x.device)

    rows = x.reshape(-1, x.shape[-1])
    run = OP.select(backend, rows, weights, a, b, biases)
    late = biases
    biases = [bias if m is None else None for bias, m in zip(biases, magnitudes, strict=True)]
    outputs = run(rows, weights, a, b, biases, scalings, float(dropout_p), seed)
    outputs = tuple(
        y if m is None else dora.rescale(y, m, dora.adapted_norm(weights[i], a[i], b[i], scalings[i]), late[i])
        for i, (y, m) in enumerate(zip(outputs, magnitudes, strict=True))
    )
    outputs = tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outputs)
    return outputs if grouped else outputs[0]


def _as_list(value: Tensor | Sequence[Tensor | None] | None) -> list:
    return [value] if value is None or isinstance(value, Tensor) else list(value)


def _check(
    x: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    biases: list[Tensor | None],
    scalings: list[float],
    magnitudes: list[Tensor | None],
    grouped: bool,
) -> None:
    if not weights:
        raise ValueError("weight: got an empty list, expected at least one projection")
    lists: dict[str, list] = dict(lora_a=lora_a, lora_b=lora_b, bias=biases, scaling=scalings, magnitude=magnitudes)
    for name, values in lists.items():
        if len(values) != len(weights):
            raise ValueError(f"{name}: got {len(values)} entries, expected one per weight, {len(weights)}")
    if x.dim() == 0:
        raise ValueError("x: got a scalar, expected [..., in]")
    for i, (weight, a, b, bias) in enumerate(zip(weights, lora_a, lora_b, biases, strict=True)):
        at = f"[{i}]" if grouped else ""
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"weight{at}: got shape {list(weight.shape)} with x of {list(x.shape)}, expected [out, in]"
            )
        out, features = weight.shape
        if a.dim() != 2 or a.shape[1] != features:
            raise ValueError(f"lora_a{at}: got shape {list(a.shape)}, expected [rank, {features}]")
        if tuple(b.shape) != (out, a.shape[0]):
            raise ValueError(f"lora_b{at}: got shape {list(b.shape)}, expected [{out}, {a.shape[0]}]")
        for name, tensor in (("bias", bias), ("magnitude", magnitudes[i])):
            if tensor is not None and tuple(tensor.shape) != (out,):
                raise ValueError(f"{name}{at}: got shape {list(tensor.shape)}, expected [{out}]")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != x.dtype:
                raise ValueError(f"{name}{at}: got {tensor.dtype}, expected the dtype of x, {x.dtype}")
        for name, tensor in (("lora_a", a), ("lora_b", b), ("magnitude", magnitudes[i])):
            if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
                raise ValueError(f"{name}{at}: got {tensor.dtype}, expected {x.dtype} as x, or torch.float32")
        if weight.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"weight{at}: requires a gradient, but lora_linear trains the adapter only; freeze it with "
                "weight.requires_grad_(False)"
            )


def _checked_seed(dropout_p: float, dropout_seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: got {dropout_p}, expected a probability in [0, 1)")
    if dropout_p == 0.0:
        return None
    if dropout_seed is None:
        raise ValueError(
            f"dropout_seed: got None, expected an int64 scalar tensor or an int with dropout_p={dropout_p}"
        )
    if isinstance(dropout_seed, int):
        return torch.full((), dropout_seed, dtype=torch.int64, device=device)
    if dropout_seed.dtype != torch.int64 or dropout_seed.numel() != 1:
        raise ValueError(
            f"dropout_seed: got {dropout_seed.dtype} of shape {list(dropout_seed.shape)}, expected an int64 scalar "
            "tensor or an int"
        )
    return dropout_seed


def _run_reference(x: Tensor, weights: list[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
    return reference.lora_linear(x, [quantized.dense(weight) for weight in weights], *arguments)


MAX_RANK = 256  # of the Triton kernels, which hold a rank in registers


def _reasons(
    x: Tensor, weights: list[Tensor], lora_a: list[Tensor], lora_b: list[Tensor], biases: list[Tensor | None]
) -> list[str]:
    return cpp_reasons(x, *weights, *lora_a, *lora_b, *biases)


def _triton_reasons(
    x: Tensor, weights: list[Tensor], lora_a: list[Tensor], lora_b: list[Tensor], biases: list[Tensor | None]
) -> list[str]:
    reasons = triton_reasons(x, *weights, *lora_a, *lora_b, *biases)
    largest = max(a.shape[0] for a in lora_a)
    if largest > MAX_RANK:
        reasons.append(f"takes ranks up to {MAX_RANK}, got {largest}")
    return reasons


OP.register("cpp", partial(lora_linear_ops.run, torch.ops.forge), _reasons)
OP.register("triton", partial(lora_linear_ops.run, torch.ops.forge_triton), _triton_reasons)
OP.register("reference", _run_reference, no_reasons)
