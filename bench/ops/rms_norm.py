"""rms_norm, forward and backward with a frozen weight, against torch's own and a hand-written eager one."""

from functools import partial

import torch
from torch.nn import functional as F

from bench.peers import compiled
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import reference, rms_norm

SHAPES = {"cpu": [(2048, 576), (1024, 4096)], "gpu": [(8192, 4096)]}


def _register(suite: str, tokens: int, width: int) -> None:
    device = suite_device(suite)

    @workload(
        "rms_norm",
        f"{tokens}x{width} fwd+bwd",
        suite=suite,
        bytes=tokens * width * 2 * 5,  # forward: x in, y out; backward: dy and x in, dx out
        headline=width in (576, 4096),
    )
    def forward_backward() -> Candidates:
        x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight = torch.rand(width, dtype=torch.bfloat16, device=device)
        dy = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)

        def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
            return lambda: torch.autograd.grad(function(x, weight), x, dy)

        def eager(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            return reference.rms_norm(x, weight, 1e-6, 0.0)

        # On a GPU "forge" is the first of these: the order in kernels/rms_norm.py is to follow what is measured here.
        both = ("cuda", "triton") if suite == "gpu" else ()
        return {
            "forge": candidate(rms_norm),
            **{f"forge ({backend})": candidate(partial(rms_norm, backend=backend)) for backend in both},
            "F.rms_norm": candidate(lambda x, weight: F.rms_norm(x, (width,), weight, 1e-6)),
            "eager": candidate(eager),
            "torch.compile": candidate(compiled(eager)),
        }


for suite, shapes in SHAPES.items():
    for tokens, width in shapes:
        _register(suite, tokens, width)
