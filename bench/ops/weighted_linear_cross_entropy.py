"""weighted_linear_cross_entropy with per-source sums, forward and backward, against full logits and fused losses."""

from functools import partial

import torch
from torch import Tensor

from bench.peers import compiled
from bench.peers import loss as peers
from bench.registry import Candidates, Thunk, peer, suite_device, workload
from forge_core.kernels import weighted_linear_cross_entropy

SOURCES = 8
# tokens, width, vocabulary
SHAPES = {"cpu": [(2048, 576, 49152), (512, 1024, 32000)], "gpu": [(8192, 4096, 128256)]}


def candidates(tokens: int, width: int, vocab: int, rows: int, frozen: bool, device: str) -> Candidates:
    """forge and its peers with `rows` rows of non-zero weight."""
    hidden, head, targets, weights = peers.inputs(tokens, width, vocab, rows, device)
    head.requires_grad_(not frozen)
    wanted = [hidden] if frozen else [hidden, head]
    source_ids = torch.randint(SOURCES, (tokens,), device=device, dtype=torch.int32)
    one = torch.ones((), device=device)

    def candidate(function: peers.WeightedLoss, weights: Tensor = weights) -> Thunk:
        return lambda: torch.autograd.grad(function(hidden, head, targets, weights), wanted, one)

    def forge(hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, backend: str = "auto") -> Tensor:
        return weighted_linear_cross_entropy(
            hidden, head, targets, weights, source_ids=source_ids, num_sources=SOURCES, backend=backend
        ).loss

    result: Candidates = {"forge": candidate(forge)}
    if device == "cuda":  # "forge" is the first of the two that can run
        result["forge, rows in CUDA"] = candidate(partial(forge, backend="cuda"))
        result["forge, rows in Triton"] = candidate(partial(forge, backend="triton"))
    if rows < tokens:
        result["forge on all rows"] = candidate(forge, torch.ones_like(weights))
    result["floor: matmuls alone"] = peers.matmuls_alone(hidden, head, rows, frozen)
    result["full logits"] = candidate(peers.full_logits)
    result["full logits compiled"] = candidate(compiled(peers.full_logits))
    result["Liger"] = peer("liger_kernel", lambda: candidate(peers.liger()))
    result["cut-cross-entropy"] = peer("cut_cross_entropy", lambda: candidate(peers.cut_cross_entropy()))
    return result


def _register(suite: str, tokens: int, width: int, vocab: int, share: float, frozen: bool) -> None:
    rows = int(tokens * share)
    aims = {"full logits": 1.5} if suite == "cpu" else {"Liger": 4.5}
    if share == 0.5:
        aims["forge on all rows"] = 1.8

    @workload(
        "weighted_linear_cross_entropy",
        f"{tokens}x{width}x{vocab} {'frozen' if frozen else 'trained'} head"
        f"{'' if share == 1 else f', {share:.0%} of rows valid'} fwd+bwd",
        suite=suite,
        flops=(4.0 if frozen else 6.0) * rows * width * vocab,  # logits, dX, and dW of a trained head
        bytes=2.0 * ((2 if frozen else 3) * vocab * width + 2 * tokens * width),
        at_least=aims,
        headline=frozen or suite == "gpu",
    )
    def build() -> Candidates:
        return candidates(tokens, width, vocab, rows, frozen, suite_device(suite))


for tokens, width, vocab in SHAPES["cpu"]:
    _register("cpu", tokens, width, vocab, 1.0, True)
    _register("cpu", tokens, width, vocab, 0.5, True)
_register("cpu", *SHAPES["cpu"][1], 1.0, False)
for tokens, width, vocab in SHAPES["gpu"]:
    for share in (1.0, 0.5, 0.3):
        _register("gpu", tokens, width, vocab, share, False)
    _register("gpu", tokens, width, vocab, 1.0, True)
