"""linear_token_logprobs with entropy, forward alone (rollouts) and with backward, against full logits."""

from functools import partial

import torch

from bench.peers import compiled
from bench.peers import loss as peers
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import linear_token_logprobs

SHAPES = {"cpu": [(1024, 576, 49152)], "gpu": [(8192, 4096, 128256)]}


def _register(suite: str, tokens: int, width: int, vocab: int, backward: bool) -> None:
    device = suite_device(suite)

    @workload(
        "linear_token_logprobs",
        f"{tokens}x{width}x{vocab} frozen head {'fwd+bwd' if backward else 'fwd'}",
        suite=suite,
        # The gradient depends on what arrives from above, so the logits are made once more: three matmuls.
        flops=(6.0 if backward else 2.0) * tokens * width * vocab,
        bytes=2.0 * (vocab * width + tokens * width) * (3 if backward else 1),
        headline=backward,
    )
    def build() -> Candidates:
        hidden, head, targets, upstream = peers.inputs(tokens, width, vocab, tokens, device)

        def candidate(function) -> Thunk:  # type: ignore[no-untyped-def]
            if backward:
                return lambda: torch.autograd.grad(function(hidden, head, targets), hidden, (upstream, upstream))

            @torch.no_grad()
            def forward() -> object:
                return function(hidden, head, targets)

            return forward

        result: Candidates = {"forge": candidate(linear_token_logprobs)}
        if device == "cuda":  # "forge" is the first of the two that can run
            result["forge, rows in CUDA"] = candidate(partial(linear_token_logprobs, backend="cuda"))
            result["forge, rows in Triton"] = candidate(partial(linear_token_logprobs, backend="triton"))
        result["full logits"] = candidate(peers.logprobs_of_logits)
        result["full logits compiled"] = candidate(compiled(peers.logprobs_of_logits))
        return result


for suite, shapes in SHAPES.items():
    for shape in shapes:
        for backward in (False, True):
            _register(suite, *shape, backward)
