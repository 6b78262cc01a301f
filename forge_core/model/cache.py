"""Keys and values of the sequences being generated, and attention of one new token per sequence over them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .config import ModelConfig
from .decoder import Attention, PackedAttend


class KVCache:
    """Fixed storage for `rows` sequences of up to `capacity` tokens; the sequences in use are always rows 0..n-1.

    `keys[layer]` and `values[layer]` are [rows, kv_heads, capacity, head_dim]; token i of a sequence lies at i.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (rows, config.num_kv_heads, capacity, config.head_dim)
        # Zeros, not empty: masked places still enter the product with the values, and 0 * NaN would be NaN.
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of row `source` over row `target`."""
        for store in (*self.keys, *self.values):
            store[target, :, :length] = store[source, :, :length]


class PrefillAttend:
    """Attention inside the documents of a pack of prompts, which also fills the cache."""

    def __init__(self, cache: KVCache, cu_seqlens: Tensor, rows: Tensor, positions: Tensor) -> None:
        self.cache, self.packed = cache, PackedAttend(cu_seqlens, None)
        self.rows, self.positions = rows, positions  # cache row and position of each token, int64 [tokens]

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        self.cache.keys[attention.index][self.rows, :, self.positions] = k
        self.cache.values[attention.index][self.rows, :, self.positions] = v
        return self.packed(attention, q, k, v)


class DecodeAttend:
    """Attention of one new token in each of the first n rows over its row of the cache.

    positions: int64 [n], the new tokens' positions; `shortest` and `longest` are their extremes, known on the host.
    """

    def __init__(self, cache: KVCache, positions: Tensor, shortest: int, longest: int) -> None:
        self.cache, self.positions = cache, positions
        self.rows = torch.arange(positions.shape[0], device=positions.device)
        self.shortest, self.longest = shortest, longest
        self._masks: dict[int | None, Tensor] = {}

    def __call__(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `decoder.Attend`."""
        keys, values = self.cache.keys[attention.index], self.cache.values[attention.index]
        keys[self.rows, :, self.positions] = k
        values[self.rows, :, self.positions] = v
        count = q.shape[0]
        first = 0 if attention.window is None else max(0, self.shortest - attention.window + 1)
        keys, values = keys[:count, :, first : self.longest + 1], values[:count, :, first : self.longest + 1]
        # The query heads that share a key head stand where a prompt's tokens would: no copies of the keys.
        grouped = q.view(count, attention.num_kv_heads, -1, attention.head_dim)
        mask = self._mask(attention.window, first, q.dtype)
        if attention.softcap is None:
            attended = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=attention.scale)
            return attended.reshape(q.shape)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        scores = torch.matmul(grouped, keys.transpose(-1, -2)).to(wide) * attention.scale
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
        probabilities = torch.softmax(scores + mask, dim=-1).to(values.dtype)
        return torch.matmul(probabilities, values).reshape(q.shape)

    def _mask(self, window: int | None, first: int, dtype: torch.dtype) -> Tensor:
        """0 where a key is visible and -inf where it is not, [n, 1, 1, keys]; one per window, not one per layer."""
        if window not in self._masks:
            index = torch.arange(first, self.longest + 1, device=self.positions.device)
            positions = self.positions[:, None]
            hidden = index > positions
            if window is not None:
                hidden |= index <= positions - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]
