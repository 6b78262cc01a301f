"""One new token of each sequence through all layers of a decoder, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from . import decode_reference
from .library import register_op
from .linear_argmax import dense_bf16_reasons
from .registry import Op, no_reasons

OP = Op("decode_layers")


@dataclass(frozen=True)
class DecodeLinear:
    """`y = x weight^T + bias + (x lora_a^T) lora_b^T`; the adapter's scaling is part of `lora_a`.

    weight [out, in], bias [out], lora_a [rank, in], lora_b [out, rank], all of one dtype and contiguous.
    """

    weight: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


@dataclass(frozen=True)
class DecodeLayer:
    """The weights of one layer. Norms are None where the architecture has none at that place.

    q_norm and k_norm are [head_dim], of each head, or [heads * head_dim], of all at once; the others [hidden].
    """

    q: DecodeLinear
    k: DecodeLinear
    v: DecodeLinear
    o: DecodeLinear
    gate: DecodeLinear
    up: DecodeLinear
    down: DecodeLinear
    pre_attention: Tensor | None = None
    post_attention: Tensor | None = None
    pre_mlp: Tensor | None = None
    post_mlp: Tensor | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    window: int | None = None  # attention sees the last `window` tokens only
    table: int = 0  # which of the rotary tables


_NORMS = ("pre_attention", "post_attention", "pre_mlp", "post_mlp", "q_norm", "k_norm")
_LINEARS = ("q", "k", "v", "o", "gate", "up", "down")


class DecodeStack:
    """The layers of a decoder and their constants, listed once for many steps; it shares the memory of the weights.

    Args:
        layers: from the first to the last, at least one.
        q_heads: query heads of every layer.
        activation: of the gate, "silu" or "gelu_tanh".
        eps: of every norm.
        weight_offset: of every norm; 0 for most models, 1 for those that store the weight minus one (Gemma).
        scale: factor of q k^T.
        softcap: attention logits become `softcap * tanh(logits / softcap)`.
    """

    def __init__(
        self,
        layers: Sequence[DecodeLayer],
        *,
        q_heads: int,
        activation: Literal["silu", "gelu_tanh"] = "silu",
        eps: float = 1e-6,
        weight_offset: float = 0.0,
        scale: float,
        softcap: float | None = None,
    ) -> None:
        self.layers = tuple(layers)
        self.q_heads, self.activation = q_heads, activation
        self.eps, self.weight_offset, self.scale, self.softcap = eps, weight_offset, scale, softcap
        # For C++: all tensors, and for each layer and place the index of its tensor, or -1; csrc/cpu/decode_layers.h
        # has the order of the places.
        self.tensors: list[Tensor] = []
        self.slots: list[int] = []
        for layer in self.layers:
            places = [getattr(layer, name) for name in _NORMS]
            for name in _LINEARS:
                linear = getattr(layer, name)
                places += [getattr(linear, field.name) for field in fields(linear)]
            for tensor in places:
                self.slots.append(-1 if tensor is None else len(self.tensors))
                if tensor is not None:
                    self.tensors.append(tensor.detach())
        self.windows = [layer.window or 0 for layer in self.layers]
        self.table_of_layer = [layer.table for layer in self.layers]
        self.not_supported_reasons = dense_bf16_reasons(*self.tensors)  # of "cpp", but for the other inputs
        if not all(tensor.is_contiguous() for tensor in self.tensors):
            self.not_supported_reasons.append("takes contiguous weights")


def decode_layers(
    x: Tensor,
    positions: Tensor,
    tables: Sequence[tuple[Tensor, Tensor]],
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    stack: DecodeStack,
    *,
    backend: str = "auto",
) -> Tensor:
    """One new token of each sequence through the layers of `stack`; its key and value join the cache. For inference.

    The same as rms_norm, frozen_linear, rope, decode_attention and swiglu one after the other. "cpp" rounds less often:
    sums of a matmul stay float32 up to the activation and the residual addition.

    Args:
        x: [sequences, hidden], float32, bfloat16, float16 or float64: the embedded tokens.
        positions: int64 [sequences]: where each token goes; sequence i is row i of the cache.
        tables: cos and sin of each rotary embedding, [positions, head_dim / 2], float32 (float64 for float64 inputs).
        keys: one [rows, kv_heads, capacity, head_dim] per layer, contiguous, dtype of x, rows >= sequences. Changed in
            place: row i at positions[i]; what lies behind is never read.
        values: shapes and dtype of keys, changed in place.
        stack: weights and constants, dtype of x.
        backend: "auto" tries "cpp" (bfloat16 on a CPU with AVX512-BF16), then "reference".

    Returns:
        [sequences, hidden], dtype of x: the residual stream after the last layer, before the final norm.

    Raises:
        ValueError: shapes or dtypes do not match, a position lies outside cache or tables ("cpp"; the reference lets
            torch complain), or the named backend cannot take the inputs.
    """
    if x.dim() != 2:
        raise ValueError(f"x: got shape {list(x.shape)}, expected [sequences, hidden]")
    if positions.dtype != torch.int64 or positions.shape != x.shape[:1]:
        raise ValueError(
            f"positions: got {positions.dtype} of shape {list(positions.shape)}, expected int64 [{x.shape[0]}]"
        )
    if not len(keys) == len(values) == len(stack.layers):
        raise ValueError(
            f"keys, values: got {len(keys)} and {len(values)} entries, expected one per layer, {len(stack.layers)}"
        )
    run = OP.select(backend, x, keys, values, stack)
    return run(x, positions, [side for table in tables for side in table], list(keys), list(values), stack)


def _reasons(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], stack: DecodeStack) -> list[str]:
    return dense_bf16_reasons(x, keys[0], values[0]) + stack.not_supported_reasons


def _run_cpp(
    x: Tensor, positions: Tensor, tables: list[Tensor], keys: list[Tensor], values: list[Tensor], stack: DecodeStack
) -> Tensor:
    return torch.ops.forge.decode_layers(
        x, positions, tables, keys, values, stack.tensors, stack.slots, stack.windows, stack.table_of_layer,
        stack.q_heads, stack.activation, stack.eps, stack.weight_offset, stack.scale, stack.softcap or 0.0,
    )  # fmt: skip


OP.register("cpp", _run_cpp, _reasons)
OP.register("reference", decode_reference.decode_layers, no_reasons)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


register_op("decode_layers", _fake)
