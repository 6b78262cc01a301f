"""The Gluon matmul of lora_linear, simulated: values, and the order of its copies and products."""

from typing import Any

import pytest
import torch

from forge_core.kernels import library, reference
from tests.gpu import gluon_simulator as simulator
from tests.gpu.gluon_steps import FAILURES, Step, steps, take_out

if not library.TRITON_INSTALLED:
    pytest.skip("triton is not installed", allow_module_level=True)

from forge_core.kernels.gpu import lora_linear_hopper as hopper

M, N, BLOCKS = 70, 96, {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP_M": 2}
SEED, P = torch.tensor(7), 0.3


def _packed(keep: torch.Tensor) -> torch.Tensor:
    # [projections, M, N] booleans as words of 32 bits.
    padded = torch.nn.functional.pad(keep, (0, -keep.shape[2] % 32)).long().unflatten(2, (-1, 32))
    return (padded << torch.arange(32)).sum(-1).to(torch.int32)


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("programs", [1, 4])
@pytest.mark.parametrize(
    ("nt", "reductions", "ranks", "dropout"),
    [
        (True, (40,), (16,), False),
        (True, (8,), (40,), False),
        (False, (40,), (16,), True),
        (False, (40, 24), (16, 32), False),
        (False, (40, 64, 16), (16, 16, 48), False),
        (False, (40, 24, 8), (48, 16, 16), True),
    ],
)
def test_values_and_order(
    nt: bool, reductions: tuple[int, ...], ranks: tuple[int, ...], dropout: bool, programs: int, stages: int
) -> None:
    _check(nt, reductions, ranks, dropout, programs, stages)


@pytest.mark.parametrize("step", steps(hopper.hopper_matmul_kernel), ids=str)
def test_a_missing_step_is_seen(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    take_out(step, monkeypatch)
    with pytest.raises(FAILURES):
        for stages in (2, 3):
            _check(False, (40, 24), (16, 32), True, 1, stages)
            _check(True, (40,), (16,), False, 1, stages)


def _check(
    nt: bool, reductions: tuple[int, ...], ranks: tuple[int, ...], dropout: bool, programs: int, stages: int
) -> None:
    torch.manual_seed(0)
    xs = [torch.randn(M, k).bfloat16() for k in reductions]
    ws = [(torch.randn(N, k) / k**0.5).bfloat16() for k in reductions]
    s = torch.randn(M, sum(ranks)).bfloat16()
    bs = [(torch.randn(N, r) / 4).bfloat16() for r in ranks]
    bias = torch.randn(N).bfloat16()
    factors = torch.stack([reference.dropout_factors((M, N), P, SEED, i, torch.float64) for i in range(len(ranks))])
    factors = factors if dropout else torch.ones_like(factors)

    expected = bias.double() if nt else torch.zeros(N, dtype=torch.float64)
    for x, w, part, b, factor in zip(xs, ws, s.split(ranks, 1), bs, factors, strict=True):
        expected = expected + x.double() @ w.double().T + factor * (part.double() @ b.double().T)

    out = torch.full((M, N), float("nan"), dtype=torch.bfloat16)
    _run(out, bias, xs, ws, s, bs, _packed(factors > 0), nt, dropout, programs, stages)
    # Sums that wait in bfloat16 for the mask of the next projection are rounded there.
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=0.02)


def _run(  # type: ignore[no-untyped-def]
    out, bias, xs, ws, s, bs, words, nt: bool, dropout: bool, programs: int, stages: int, **changes: Any
) -> None:
    def three(values: list) -> list:
        return values + values[:1] * (3 - len(values))

    block_m, block_n, block_k = (BLOCKS[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))

    def weight(w: torch.Tensor) -> simulator.Descriptor:
        return simulator.Descriptor(*((w, [block_n, block_k]) if nt else (w.T, [block_k, block_n])))

    ranks = three([b.shape[1] for b in bs])
    simulator.run(
        hopper, hopper.hopper_matmul_kernel, programs,
        simulator.Descriptor(out, [block_m, block_n]), simulator.Pointer(bias),
        *three([simulator.Descriptor(x, [block_m, block_k]) for x in xs]), *three([weight(w) for w in ws]),
        *three([-(-x.shape[1] // block_k) for x in xs]), simulator.Descriptor(s, [block_m, block_k]),
        *three([weight(b) for b in bs]), ranks[0], ranks[0] + ranks[1], simulator.Pointer(words),
        1 / (1 - P) if dropout else 1.0, M, N, GROUP=len(xs), R0=ranks[0], R1=ranks[1], R2=ranks[2], NT=nt, BIAS=nt,
        DROPOUT=dropout, STAGES=stages, **BLOCKS, num_warps=8,
    )  # fmt: skip
