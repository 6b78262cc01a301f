import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from forge_core.kernels import gradient_norm, reference
from forge_core.kernels.gradient_norm import OP
from forge_core.kernels.registry import no_reasons
from tests.backends import Backend, backends
from tests.tolerance import check_op

# Blocks on the CPU hold 4096 values, chunks of the CUDA kernel 16384, its packs 4, its table 1024 tensors.
CASES = {
    "one value": [(1,)],
    "around blocks": [(4095,), (4096,), (4097,), (16383,), (16384,), (16388,), (40001,)],
    "empty between": [(0,), (7, 3), (0, 5), (2, 3, 4), ()],
    "more than a table": [(3,)] * 1030,
}
BY_BLOCKS = pytest.param(Backend("by_blocks", "cpu"), id="by_blocks")  # the CUDA kernel's work, on the CPU
BACKENDS = [*backends("gradient_norm"), BY_BLOCKS]


@pytest.fixture(autouse=True)
def _by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "backends", OP.backends.copy())
    OP.register("by_blocks", torch.ops.forge.gradient_norm_by_blocks, no_reasons)


def _gradients(case: str, dtype: torch.dtype, scale: float = 1.0) -> list[Tensor]:
    torch.manual_seed(0)
    gradients = [torch.randn(shape) for shape in CASES[case]]
    total = math.sqrt(sum(gradient.numel() for gradient in gradients))
    return [(gradient * (scale / total)).to(dtype) for gradient in gradients]


def _norm(backend: Backend) -> Callable[..., Tensor]:
    return lambda gradients: gradient_norm(gradients, backend=backend.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend: Backend, case: str, dtype: torch.dtype) -> None:
    check_op(_norm(backend), reference.gradient_norm, [_gradients(case, dtype)], device=backend.device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_dtypes_mixed(backend: Backend) -> None:
    gradients = [
        torch.randn(33, 12).t(), torch.randn(12, 66)[:, ::2], torch.randn(20_001)[1:], torch.randn(20_003).half()[3:],
        torch.randn(500).bfloat16(), torch.randn(9),
    ]  # fmt: skip
    on_device = [gradient.to(backend.device) for gradient in gradients]
    expected = torch.cat([gradient.double().flatten() for gradient in gradients]).norm()
    assert float(_norm(backend)(on_device)) == pytest.approx(float(expected), rel=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_squares_beyond_float32_and_values_that_are_not_finite(backend: Backend) -> None:
    for value in (1e30, 1e-30, math.inf, math.nan):
        gradients = [torch.full((100,), value, device=backend.device), torch.zeros(3, device=backend.device)]
        assert float(_norm(backend)(gradients)) == pytest.approx(10 * value, rel=1e-6, nan_ok=True)


def test_repeatable_and_independent_of_threads() -> None:
    gradients = _gradients("around blocks", torch.float32) * 20
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            runs.append(gradient_norm(gradients, backend="cpp"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


@pytest.mark.parametrize("backend", backends("gradient_norm", gpu_only=True))
def test_on_gpu_large_and_repeatable(backend: Backend) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(1024, 14336, device="cuda") for _ in range(4)] + [torch.randn(4096, device="cuda")] * 1500
    runs = [_norm(backend)(gradients) for _ in range(3)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])
    assert float(runs[0]) == pytest.approx(float(reference.gradient_norm(gradients)), rel=1e-7)


def test_float64_and_nothing() -> None:
    norm = gradient_norm([torch.full((4,), 3.0, dtype=torch.float64), torch.zeros(2)])
    assert norm.dtype == torch.float64 and float(norm) == 6.0
    assert gradient_norm([]).equal(torch.zeros(()))


@pytest.mark.parametrize("backend", backends("gradient_norm"))
def test_opcheck_and_compile(backend: Backend) -> None:
    gradients = [gradient.to(backend.device) for gradient in _gradients("empty between", torch.float32)]
    torch.library.opcheck(torch.ops.forge.gradient_norm.default, (gradients,))
    compiled = torch.compile(_norm(backend), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gradients), _norm(backend)(gradients))


def test_errors_say_why() -> None:
    with pytest.raises(ValueError, match=r"backend 'cpp' cannot take.*\n  cpp: takes float32, .* got torch.float64"):
        gradient_norm([torch.ones(2).double()], backend="cpp")
    with pytest.raises(ValueError, match=r"runs on cpu, got tensors on meta"):
        gradient_norm([torch.ones(2), torch.ones(2, device="meta")], backend="cpp")
