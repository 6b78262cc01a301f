"""The layers of a decoder as decode_layers takes them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from torch import Tensor

from .linear_argmax import dense_bf16_reasons


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
