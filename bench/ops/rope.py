"""rope on queries and keys, forward and backward, against the rotate-half arithmetic of transformers."""

import torch
from torch import Tensor

from bench.peers import compiled
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import rope

SHAPES = {"cpu": [(2048, 9, 3, 64), (1024, 32, 8, 128)], "gpu": [(8192, 32, 8, 128)]}


def rotate_half(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """transformers' formula, in the dtype of q: x cos + [-x2, x1] sin; cos and sin [tokens, 1, d]."""

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(q), rotate(k)


def _register(suite: str, tokens: int, q_heads: int, kv_heads: int, d: int) -> None:
    device = suite_device(suite)

    @workload(
        "rope",
        f"{tokens} tokens, {q_heads}/{kv_heads} heads, D {d} fwd+bwd",
        suite=suite,
        bytes=2 * 2.0 * tokens * d * 2 * (q_heads + kv_heads),  # in and out, forward and backward
    )
    def forward_backward() -> Candidates:
        q, k = (
            torch.randn(tokens, heads, d, dtype=torch.bfloat16, device=device, requires_grad=True)
            for heads in (q_heads, kv_heads)
        )
        upstream = (torch.randn_like(q), torch.randn_like(k))
        angle = torch.arange(tokens, device=device)[:, None] * 1e4 ** (-torch.arange(d // 2, device=device) / (d // 2))
        cos, sin = angle.cos(), angle.sin()
        wide = tuple(torch.cat((table, table), -1).bfloat16()[:, None] for table in (cos, sin))

        def candidate(function, tables) -> Thunk:  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(q, k, *tables), (q, k), upstream)

        return {
            "forge": candidate(rope, (cos, sin)),
            "eager": candidate(rotate_half, wide),
            "torch.compile": candidate(compiled(rotate_half), wide),
        }


for suite, shapes in SHAPES.items():
    for shape in shapes:
        _register(suite, *shape)
