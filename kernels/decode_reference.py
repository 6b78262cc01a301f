"""Plain-torch definition of kernels/decode_layers.py, made of the definitions of kernels/reference.py."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .decode_stack import DecodeLinear, DecodeStack
from .reference import decode_attention, rms_norm, rope, swiglu


def decode_layers(
    x: Tensor, positions: Tensor, tables: list[Tensor], keys: list[Tensor], values: list[Tensor], stack: DecodeStack
) -> Tensor:
    """The layers one after the other; what the op says."""

    def norm(y: Tensor, weight: Tensor | None) -> Tensor:
        return y if weight is None else rms_norm(y, weight, stack.eps, stack.weight_offset)

    def linear(y: Tensor, layer: DecodeLinear) -> Tensor:
        out = F.linear(y, layer.weight, layer.bias)
        if layer.lora_a is None or layer.lora_b is None:
            return out
        return out + F.linear(F.linear(y, layer.lora_a), layer.lora_b)

    count = x.shape[0]
    rows = torch.arange(count, device=x.device)
    for index, layer in enumerate(stack.layers):
        normed = norm(x, layer.pre_attention)
        d = keys[index].shape[3]
        q, k, v = (linear(normed, part) for part in (layer.q, layer.k, layer.v))
        if layer.q_norm is not None and layer.q_norm.shape[0] != d:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        q, k, v = (y.view(count, -1, d) for y in (q, k, v))
        if layer.q_norm is not None and layer.q_norm.shape[0] == d:
            q, k = norm(q, layer.q_norm), norm(k, layer.k_norm)
        cos, sin = (table[positions] for table in tables[2 * layer.table : 2 * layer.table + 2])
        q, k = rope(q, k, cos, sin)
        keys[index][rows, :, positions], values[index][rows, :, positions] = k, v
        attended = decode_attention(
            q, keys[index], values[index], positions + 1, layer.window, stack.softcap, stack.scale
        )
        x = x + norm(linear(attended.flatten(1), layer.o), layer.post_attention)
        normed = norm(x, layer.pre_mlp)
        inner = swiglu(linear(normed, layer.gate), linear(normed, layer.up), stack.activation)
        x = x + norm(linear(inner, layer.down), layer.post_mlp)
    return x
