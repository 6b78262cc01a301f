"""decode_attention of one token per sequence over a key/value cache, against SDPA with a mask and batched matmuls."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import Candidates, workload
from forge_core.kernels import decode_attention, reference

SEQUENCES, CAPACITY, D = 32, 512, 64


def _register(q_heads: int, kv_heads: int, length: int) -> None:
    group = q_heads // kv_heads

    @workload(
        "decode_attention",
        f"{SEQUENCES} sequences of {length}, {q_heads}/{kv_heads} heads, D {D}",
        flops=4.0 * SEQUENCES * q_heads * length * D,
        bytes=2.0 * SEQUENCES * D * (2 * kv_heads * length + 2 * q_heads),
    )
    def forward() -> Candidates:
        q = torch.randn(SEQUENCES, q_heads, D, dtype=torch.bfloat16)
        keys, values = (torch.randn(SEQUENCES, kv_heads, CAPACITY, D, dtype=torch.bfloat16) for _ in range(2))
        lengths = torch.full((SEQUENCES,), length)

        def sdpa() -> Tensor:
            # The query heads that share a key head as rows: SDPA's own grouping copies the keys and is slower.
            rows = q.view(SEQUENCES, kv_heads, group, D)
            return F.scaled_dot_product_attention(rows, keys[:, :, :length], values[:, :, :length])

        return {
            "forge": lambda: decode_attention(q, keys, values, lengths),
            "SDPA": sdpa,
            "eager": lambda: reference.decode_attention(q, keys, values, lengths, None, None, D**-0.5),
        }


_register(9, 3, 100)
_register(32, 8, 400)
