"""packed_attention on a pack of log-normal documents, against SDPA per document and under a dense block mask."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import Candidates, Thunk, workload
from forge_core.kernels import packed_attention

TOKENS, Q_HEADS, KV_HEADS = 8192, 16, 4


def document_lengths(tokens: int, mean: int = 330, seed: int = 0) -> list[int]:
    """Log-normal lengths (sigma 1) that fill `tokens` exactly."""
    generator = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        lengths.append(max(8, int(generator.lognormal(np.log(mean) - 0.5, 1.0))))
    lengths[-1] -= sum(lengths) - tokens
    return lengths


def sdpa_per_document(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """One scaled_dot_product_attention call per document."""
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    return torch.cat([_sdpa(*part, is_causal=True) for part in parts])


def sdpa_block_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One scaled_dot_product_attention call for the pack, with a [tokens, tokens] mask."""
    return _sdpa(q, k, v, attn_mask=mask)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:  # type: ignore[no-untyped-def]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)[0].transpose(0, 1)


def _register(d: int, backward: bool) -> None:
    lengths = document_lengths(TOKENS)
    area = sum(n * (n + 1) / 2 for n in lengths)
    passes = 3.5 if backward else 1.0  # backward counted as 2.5 times the forward
    which = "fwd+bwd" if backward else "fwd"
    io = 2.0 * TOKENS * d * (2 * Q_HEADS + 2 * KV_HEADS)

    @workload(
        "packed_attention",
        f"{TOKENS} tokens, {len(lengths)} documents, {Q_HEADS}/{KV_HEADS} heads, D {d} {which}",
        flops=passes * 4.0 * d * Q_HEADS * area,
        bytes=io * (3 if backward else 1),
    )
    def build() -> Candidates:
        q = torch.randn(TOKENS, Q_HEADS, d, dtype=torch.bfloat16, requires_grad=backward)
        k, v = (torch.randn(TOKENS, KV_HEADS, d, dtype=torch.bfloat16, requires_grad=backward) for _ in range(2))
        upstream = torch.randn_like(q)
        cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        position = torch.arange(TOKENS)
        mask = (document[:, None] == document[None, :]) & (position[:, None] >= position[None, :])

        def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
            if backward:
                return lambda: torch.autograd.grad(function(), (q, k, v), upstream)
            return function

        return {
            "forge": candidate(lambda: packed_attention(q, k, v, cu_seqlens)),
            "SDPA per document": candidate(lambda: sdpa_per_document(q, k, v, lengths)),
            "SDPA block mask": candidate(lambda: sdpa_block_mask(q, k, v, mask)),
        }


for head_dim in (64, 128):
    for with_backward in (False, True):
        _register(head_dim, with_backward)
