"""The two ops behind lora_linear, their fakes and their autograd."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import quantized
from .library import register_op

# The two ops are halves of one function: lora_matmul's backward gives dS' = scaling * dY B where autograd expects the
# gradient of S, and all of dX; lora_shrink's backward turns dS' into dA and has nothing to add to dX. The reasons are
# at the top of csrc/cpu/lora_linear.cpp. Neither op is public, and neither is right without the other.
#
# The Triton ops have one more tensor, always the last: the dropout bits, which the forward pass keeps for the backward
# because making them costs more time than reading them. `bits` below is empty for the compiled ops.


def run(
    ops: Any,
    x: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    biases: list[Tensor | None],
    *rest: Any,
) -> tuple[Tensor, ...]:
    """lora_linear of x [tokens, in]; `ops` is torch.ops.forge or forge_triton, `rest` scaling, dropout_p and seed."""
    given = []
    if any(bias is not None for bias in biases):
        given = [x.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    if _runs_as_one_node(x, weights):
        return _Both.apply(ops, rest, len(weights), x, *weights, *lora_a, *lora_b, *given)
    s, *bits = _shrink(ops, x, lora_a, *rest)
    arguments = (x, s, weights, lora_a, lora_b, given, *rest, *bits)
    if any(map(quantized.is_quantized, weights)):
        return tuple(quantized.matmul(ops, _setup_matmul, _backward_matmul, *arguments))
    return tuple(ops.lora_matmul(*arguments))


def _shrink(ops: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """S, and from Triton the dropout bits."""
    shrunk = ops.lora_shrink(*arguments)
    return (shrunk,) if isinstance(shrunk, Tensor) else shrunk


def _runs_as_one_node(x: Tensor, weights: list[Tensor]) -> bool:
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (x, *weights))
    )


class _Both(torch.autograd.Function):
    """Both ops in one node: half the Python. Not for checkpoints (see above), the compiler, tensors of other types."""

    @staticmethod
    def forward(ctx: Any, ops: Any, rest: tuple, projections: int, x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        lists = [list(tensors[i * projections : (i + 1) * projections]) for i in range(4)]
        weights, lora_a, lora_b, _ = lists
        with torch._C._AutoDispatchBelowAutograd():
            s, *bits = _shrink(ops, x, lora_a, *rest)
            ys = ops.lora_matmul(x, s, *lists, *rest, *bits)
        ctx.save_for_backward(x, *bits)
        ctx.ops, ctx.rest, ctx.matmul_inputs = ops, rest, (s, weights, lora_a, lora_b)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *bits = ctx.saved_tensors
        *inputs, lora_a, lora_b = ctx.matmul_inputs
        count = len(dys)
        need_x, *needs = ctx.needs_input_grad[3:]
        need_a, need_b = any(needs[count : 2 * count]), any(needs[2 * count : 3 * count])
        das: list = [None] * count
        with torch._C._AutoDispatchBelowAutograd():
            dx, ds, dbs = ctx.ops.lora_matmul_backward(
                list(dys), *inputs, lora_a, lora_b, *ctx.rest, need_x, need_b, *bits
            )
            if need_a:
                ranks, wide = [a.shape[0] for a in lora_a], [a.dtype != x.dtype for a in lora_a]
                das = ctx.ops.lora_shrink_backward(ds, x, ranks, wide, *ctx.rest[1:], *bits)
        dbiases = [dy.sum(0) if need else None for dy, need in zip(dys, needs[3 * count :], strict=False)]
        return None, None, None, dx if need_x else None, *[None] * count, *das, *(dbs or [None] * count), *dbiases


def _fake_shrink(
    x: Tensor, lora_a: list[Tensor], scaling: list[float], dropout_p: float, dropout_seed: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], sum(a.shape[0] for a in lora_a))


def _gpu_fake_shrink(
    x: Tensor, lora_a: list[Tensor], scaling: list[float], dropout_p: float, dropout_seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (0,) if dropout_seed is None else (len(lora_a), x.shape[0], (x.shape[1] + 31) // 32)
    return _fake_shrink(x, lora_a, scaling, dropout_p, dropout_seed), x.new_empty(shape, dtype=torch.int32)


def _fake_shrink_backward(
    ds: Tensor,
    x: Tensor,
    ranks: list[int],
    wide: list[bool],
    dropout_p: float,
    dropout_seed: Tensor | None,
    *bits: Tensor,
) -> list[Tensor]:
    return [
        x.new_empty(rank, x.shape[1], dtype=torch.float32 if is_wide else x.dtype)
        for rank, is_wide in zip(ranks, wide, strict=True)
    ]


def _setup_shrink(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, lora_a, scaling, ctx.dropout_p, ctx.dropout_seed = inputs
    ctx.projections = len(scaling)
    ctx.ranks = [a.shape[0] for a in lora_a]
    ctx.wide = [a.dtype != x.dtype for a in lora_a]
    bits = () if isinstance(output, Tensor) else output[1:]
    ctx.save_for_backward(x, *bits)


def _backward_shrink(ops, ctx, ds: Tensor, *_: object):  # type: ignore[no-untyped-def]
    das: list[Tensor] | list[None] = [None] * ctx.projections
    if any(ctx.needs_input_grad[1]):
        x, *bits = ctx.saved_tensors
        das = ops.lora_shrink_backward(ds, x, ctx.ranks, ctx.wide, ctx.dropout_p, ctx.dropout_seed, *bits)
    return None, das, None, None, None


register_op(
    "lora_shrink",
    _fake_shrink,
    _backward_shrink,
    _setup_shrink,
    gpu="lora_linear",
    gpu_fake=_gpu_fake_shrink,
    gpu_schema="(Tensor x, Tensor[] lora_a, float[] scaling, float dropout_p, Tensor? dropout_seed)"
    " -> (Tensor s, Tensor bits)",
)
register_op(
    "lora_shrink_backward",
    _fake_shrink_backward,
    gpu="lora_linear",
    gpu_schema="(Tensor ds, Tensor x, int[] ranks, bool[] wide, float dropout_p,"
    " Tensor? dropout_seed, Tensor bits) -> Tensor[]",
)


def _fake_matmul(
    x: Tensor,
    s: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    biases: list[Tensor],
    scaling: list[float],
    dropout_p: float,
    dropout_seed: Tensor | None,
    *bits: Tensor,
) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _fake_matmul_backward(
    dys: list[Tensor],
    s: Tensor,
    weights: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scaling: list[float],
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_dx: bool,
    need_db: bool,
    *bits: Tensor | None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dx = s.new_empty((s.shape[0], weights[0].shape[1]) if need_dx else (0,))
    return dx, torch.empty_like(s), [b.new_empty(b.shape) for b in lora_b] if need_db else []


def _setup_matmul(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, ctx.s, ctx.weights, ctx.lora_a, ctx.lora_b, ctx.biases, ctx.scaling, ctx.dropout_p, *rest = inputs
    ctx.dropout_seed, *bits = rest
    # Attributes, not save_for_backward: a tensor saved here would make the recomputation of a checkpointed block run
    # this op again just to save it. x is not kept at all; S costs tokens * rank. The bits, in / 8 bytes a token and
    # projection, are too much to keep behind the back of whoever packs saved tensors: they are then made again.
    packed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    ctx.bits = [None if packed else b for b in bits]


def _backward_matmul(ops, ctx, dys: list[Tensor]):  # type: ignore[no-untyped-def]
    need_x, need_s, _, _, need_b, need_bias, *_ = ctx.needs_input_grad
    dx, ds, dbs = ops.lora_matmul_backward(
        dys,
        ctx.s,
        ctx.weights,
        ctx.lora_a,
        ctx.lora_b,
        ctx.scaling,
        ctx.dropout_p,
        ctx.dropout_seed,
        need_x,
        any(need_b),
        *ctx.bits,
    )
    dbiases = [dy.sum(0) if need else None for dy, need in zip(dys, need_bias, strict=False)]
    none = [None] * len(dys)
    return (
        dx if need_x else None,
        ds if need_s else None,
        none,
        none,
        dbs if any(need_b) else none,
        dbiases,
        None,
        None,
        None,
        *(None for _ in ctx.bits),
    )


register_op(
    "lora_matmul",
    _fake_matmul,
    _backward_matmul,
    _setup_matmul,
    gpu="lora_linear",
    gpu_schema="(Tensor x, Tensor s, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b, Tensor[] biases,"
    " float[] scaling, float dropout_p, Tensor? dropout_seed, Tensor bits) -> Tensor[]",
)
register_op(
    "lora_matmul_backward",
    _fake_matmul_backward,
    gpu="lora_linear",
    gpu_schema="(Tensor[] dys, Tensor s, Tensor[] weights, Tensor[] lora_a, Tensor[] lora_b,"
    " float[] scaling, float dropout_p, Tensor? dropout_seed, bool need_dx, bool need_db, Tensor? bits)"
    " -> (Tensor dx, Tensor ds, Tensor[] dbs)",
)
