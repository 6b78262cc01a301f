"""Keys and values of the sequences being generated, and attention of one new token per sequence over them."""

from __future__ import annotations

import torch
from torch import Tensor

from forge_core.kernels import decode_attention

from .config import ModelConfig
from .decoder import Attention, PackedAttend

_GRANULE = 64  # tokens; capacity is a multiple of it


class KVCache:
    """Storage for `rows` sequences that grows with the longest; the sequences in use are always rows 0..n-1.

    `keys[layer]` and `values[layer]` are contiguous [rows, kv_heads, capacity, head_dim]; token i of a sequence lies
    at i.
    """

    def __init__(self, config: ModelConfig, rows: int, *, dtype: torch.dtype, device: torch.device) -> None:
        shape = (rows, config.num_kv_heads, 0, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.capacity = 0

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens; what is stored stays."""
        if length <= self.capacity:
            return
        wanted = max(length, self.capacity * 9 // 8)
        added = -(-wanted // _GRANULE) * _GRANULE - self.capacity
        self.capacity += added
        for stores in (self.keys, self.values):
            for layer, store in enumerate(stores):
                stores[layer] = store.new_empty((*store.shape[:2], self.capacity, store.shape[3]))
                stores[layer][:, :, : store.shape[2]] = store

    def write(self, layer: int, rows: Tensor, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Store k and v [tokens, kv_heads, head_dim] at the given row and position of each token."""
        self.keys[layer][rows, :, positions] = k
        self.values[layer][rows, :, positions] = v

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]


class PrefillAttend:
    """Attention inside a pack of prompts, which also fills the cache.

    Token source[i] of the pack goes to row rows[i], position positions[i] of the cache (int64, on its device). Where
    prompts share a prefix, a token goes to several rows.
    """

    def __init__(self, cache: KVCache, packed: PackedAttend, source: Tensor, rows: Tensor, positions: Tensor) -> None:
        self.cache, self.packed = cache, packed
        self.source, self.rows, self.positions = source, rows, positions

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        self.cache.write(attention.index, self.rows, self.positions, k[self.source], v[self.source])
        return self.packed(attention, q, k, v)


class DecodeAttend:
    """Attention of one new token in each of the first n rows over its row of the cache.

    positions: int64 [n], where the new tokens go.
    """

    def __init__(self, cache: KVCache, positions: Tensor) -> None:
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(positions.shape[0], device=positions.device)
        self.lengths = positions + 1

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        self.cache.write(attention.index, self.rows, self.positions, k, v)
        return decode_attention(
            q,
            self.cache.keys[attention.index],
            self.cache.values[attention.index],
            self.lengths,
            window=attention.window,
            softcap=attention.softcap,
            scale=attention.scale,
        )
