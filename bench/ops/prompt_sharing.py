"""packed_attention on answers to one prompt, which stands in the pack once, against a row for each answer."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bench.peers import attention as peers
from bench.registry import Candidates, Slow, Thunk, suite_device, workload
from forge_core.kernels import PackPlan, packed_attention

PROMPT, ANSWERS, ANSWER = 1024, 8, 256


@dataclass(frozen=True)
class Heads:
    """Query and key/value heads, and their dimension."""

    q: int
    kv: int
    d: int


SHAPES = {"cpu": [Heads(16, 4, 64)], "gpu": [Heads(32, 8, 128)]}


def pairs(documents: list[tuple[int, int]]) -> int:
    """Visible pairs of causal documents: (tokens before it that it sees, its own tokens)."""
    return sum(n * before + n * (n + 1) // 2 for before, n in documents)


def _pack(lengths: list[int], heads: Heads, backward: bool, device: str) -> tuple[list[Tensor], Tensor, np.ndarray]:
    """q, k and v, an upstream gradient, and cu_seqlens on the host."""
    inputs = [
        torch.randn(sum(lengths), count, heads.d, dtype=torch.bfloat16, device=device, requires_grad=backward)
        for count in (heads.q, heads.kv, heads.kv)
    ]
    return inputs, torch.randn_like(inputs[0]), np.array([0, *np.cumsum(lengths)], np.int32)


def candidates(heads: Heads, backward: bool, device: str) -> Candidates:
    """forge with the prompt once; forge and SDPA on a row for each answer, SDPA on the same pack with a mask."""
    lengths, row = [PROMPT] + [ANSWER] * ANSWERS, PROMPT + ANSWER
    shared, upstream, host = _pack(lengths, heads, backward, device)
    rows, rows_upstream, row_host = _pack([row] * ANSWERS, heads, backward, device)
    tree = np.array([-1] + [0] * ANSWERS, np.int32)
    plan, row_plan = PackPlan(host, parents=tree), PackPlan(row_host)
    bounds, row_bounds, parents = (torch.tensor(x, device=device) for x in (host, row_host, tree))
    document = torch.tensor(np.repeat(np.arange(len(lengths)), lengths), device=device)
    causal = torch.ones(len(document), len(document), dtype=torch.bool, device=device).tril()
    mask = causal & ((document[:, None] == document) | (document == 0))

    def candidate(function, inputs: list[Tensor], gradient: Tensor) -> Thunk:  # type: ignore[no-untyped-def]
        call = lambda: function(*inputs)  # noqa: E731
        return peers.with_backward(call, tuple(inputs), gradient) if backward else call

    masked = candidate(lambda q, k, v: peers.sdpa_block_mask(q, k, v, mask), shared, upstream)
    return {
        "forge": candidate(
            lambda q, k, v: packed_attention(q, k, v, bounds, parents=parents, plan=plan), shared, upstream
        ),
        "separate rows": candidate(
            lambda q, k, v: packed_attention(q, k, v, row_bounds, plan=row_plan), rows, rows_upstream
        ),
        "SDPA separate rows": candidate(
            lambda q, k, v: peers.sdpa_per_document(q, k, v, [row] * ANSWERS), rows, rows_upstream
        ),
        "SDPA tree mask": Slow(masked, 2) if device == "cpu" else masked,
    }


def _register(suite: str, heads: Heads, backward: bool) -> None:
    device = suite_device(suite)
    area = pairs([(0, PROMPT)] + [(PROMPT, ANSWER)] * ANSWERS)
    repeated = pairs([(0, PROMPT + ANSWER)] * ANSWERS)
    io = 2.0 * (PROMPT + ANSWERS * ANSWER) * heads.d * (2 * heads.q + 2 * heads.kv)

    @workload(
        "packed_attention",
        f"shared prompt, {ANSWERS} x {ANSWER} after {PROMPT}, {heads.q}/{heads.kv} heads, D {heads.d} "
        f"{'fwd+bwd' if backward else 'fwd'}",
        suite=suite,
        flops=(3.5 if backward else 1.0) * 4.0 * heads.d * heads.q * area,
        bytes=io * (3 if backward else 1),
        note=f"Separate rows have {repeated / area:.2f} times the visible pairs, and {ANSWERS * (PROMPT + ANSWER)} "
        f"instead of {PROMPT + ANSWERS * ANSWER} rows in everything else of a model.",
        at_least={"separate rows": 2.0, "SDPA separate rows": 4.0},
    )
    def build() -> Candidates:
        return candidates(heads, backward, device)


for suite, shapes in SHAPES.items():
    for heads in shapes:
        for backward in (False, True):
            _register(suite, heads, backward)
