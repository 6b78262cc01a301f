"""A step of generation: one new token of each sequence through the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from forge_core.kernels import DecodeLayer, DecodeLinear, DecodeStack, decode_layers

from .cache import DecodeAttend, KVCache
from .decoder import DecoderLayer
from .layers import Linear, RMSNorm

if TYPE_CHECKING:
    from .decoder import CausalLM


class DecodeStep:
    """Runs the layers as one op where the CPU can (bfloat16 on AVX512-BF16), else module by module.

    Made for one generation: weights and adapters must not change while it is in use.
    """

    def __init__(self, model: CausalLM, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        # The op has no magnitudes of DoRA.
        magnitudes = any(
            isinstance(module, Linear) and module.adapter_active and module.lora_magnitude_vector is not None
            for module in model.modules()
        )
        stack = None if magnitudes else _stack(model)
        self.stack = None if stack is None or stack.not_supported_reasons else stack
        self.tables: list[tuple[Tensor, Tensor]] = []  # of every position that the cache has room for

    def __call__(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Token i, at positions[i], joins row i of the cache; int64 [n] both -> hidden states [n, hidden]."""
        decoder, cache = self.model.model, self.cache
        if self.stack is None:
            return decoder(input_ids, positions, DecodeAttend(cache, positions))
        if not self.tables or self.tables[0][0].shape[0] < cache.capacity:
            self.tables = decoder.rotary(torch.arange(cache.capacity), torch.bfloat16)
        x = decoder.embed_tokens(input_ids)
        return decoder.norm(decode_layers(x, positions, self.tables, cache.keys, cache.values, self.stack))


def _stack(model: CausalLM) -> DecodeStack:
    config = model.config
    return DecodeStack(
        [_layer(layer) for layer in model.model.layers],
        q_heads=config.num_heads,
        activation=config.activation,
        eps=config.rms_norm_eps,
        weight_offset=config.norm_weight_offset,
        scale=config.attention_scale,
        softcap=config.attention_softcap,
    )


def _layer(layer: torch.nn.Module) -> DecodeLayer:
    assert isinstance(layer, DecoderLayer)
    attention, mlp, names = layer.self_attn, layer.mlp, layer.norm_names

    def norm(name: str | None) -> Tensor | None:
        return None if name is None else _scale(layer.get_submodule(name))

    return DecodeLayer(
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        o=_linear(attention.o_proj),
        gate=_linear(mlp.gate_proj),
        up=_linear(mlp.up_proj),
        down=_linear(mlp.down_proj),
        pre_attention=norm(names.pre_attention),
        post_attention=norm(names.post_attention),
        pre_mlp=norm(names.pre_mlp),
        post_mlp=norm(names.post_mlp),
        q_norm=None if attention.q_norm is None else _scale(attention.q_norm),
        k_norm=None if attention.k_norm is None else _scale(attention.k_norm),
        window=attention.window,
        table=attention.rope_index,
    )


def _scale(norm: torch.nn.Module) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return norm.weight


def _linear(linear: Linear) -> DecodeLinear:
    if not linear.adapter_active or linear.lora_A is None or linear.lora_B is None:
        return DecodeLinear(linear.weight, linear.bias)
    dtype = linear.weight.dtype
    lora_a = (linear.lora_A.weight * linear.scaling).to(dtype)
    return DecodeLinear(linear.weight, linear.bias, lora_a, linear.lora_B.weight.to(dtype).contiguous())
