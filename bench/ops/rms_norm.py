"""rms_norm, forward and backward with a frozen weight, against torch's own and a hand-written eager one."""

import torch
from torch.nn import functional as F

from bench.registry import Candidates, Thunk, workload
from forge_core.kernels import reference, rms_norm

TOKENS, WIDTH = 2048, 576


@workload(
    "rms_norm",
    f"{TOKENS}x{WIDTH} fwd+bwd",
    bytes=TOKENS * WIDTH * 2 * 5,  # forward: x in, y out; backward: dy and x in, dx out
)
def forward_backward() -> Candidates:
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.rand(WIDTH, dtype=torch.bfloat16)
    dy = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)

    def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
        return lambda: torch.autograd.grad(function(x, weight), x, dy)

    return {
        "forge": candidate(rms_norm),
        "F.rms_norm": candidate(lambda x, weight: F.rms_norm(x, (WIDTH,), weight, 1e-6)),
        "eager": candidate(lambda x, weight: reference.rms_norm(x, weight, 1e-6, 0.0)),
    }
