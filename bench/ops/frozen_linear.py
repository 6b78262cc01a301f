"""frozen_linear at the sizes of decoding: a layer's worth of weights that no cache holds, a few tokens."""

import torch
from torch.nn import functional as F

from bench.registry import Candidates, workload
from forge_core.kernels import frozen_linear

LAYERS, K, N = 60, 576, 1536  # 106 MB of weights
TOKENS = (1, 8, 32, 64)


def _register(tokens: int) -> None:
    @workload(
        "frozen_linear",
        f"{tokens}x{K}->{N}, {LAYERS} layers, fwd",
        flops=2.0 * LAYERS * tokens * K * N,
        bytes=2.0 * LAYERS * (K * N + tokens * (K + N)),
    )
    def forward() -> Candidates:
        x = torch.randn(tokens, K, dtype=torch.bfloat16)
        weights = [(torch.randn(N, K) / K**0.5).bfloat16() for _ in range(LAYERS)]
        return {
            "forge": lambda: [frozen_linear(x, [weight]) for weight in weights],
            "F.linear": lambda: [F.linear(x, weight) for weight in weights],
        }


for count in TOKENS:
    _register(count)
