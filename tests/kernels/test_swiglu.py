import pytest
import torch
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import reference, swiglu
from tests.backends import Backend, backends
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["silu", "gelu_tanh"]
# One element, odd sizes around every vector width, several dimensions, more than one task, nothing.
SHAPES = [(1,), (3, 7), (5, 17), (2, 3, 96), (9, 4001), (0, 8), (8, 0)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list:
    torch.manual_seed(0)
    return [(torch.randn(shape) * 2).to(device, dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", backends("swiglu"))
def test_matches_reference(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    check_op(
        lambda gate, up: swiglu(gate, up, activation=activation, backend=backend.name),
        lambda gate, up: reference.swiglu(gate, up, activation),
        _inputs(shape, dtype),
        device=backend.device,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", backends("swiglu", gpu_only=True))
def test_on_gpu_matches_reference(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    check_op(
        lambda gate, up: swiglu(gate, up, activation=activation, backend=backend.name),
        lambda gate, up: reference.swiglu(gate, up, activation),
        _inputs((300, 14336), dtype),
        device=backend.device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", backends("swiglu"))
def test_non_contiguous(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    gate = torch.randn(33, 12, dtype=dtype).t().requires_grad_()
    up = torch.randn(12, 66, dtype=dtype)[:, ::2].requires_grad_()
    check_op(
        lambda gate, up: swiglu(gate, up, activation=activation, backend=backend.name),
        lambda gate, up: reference.swiglu(gate, up, activation),
        [gate, up],
        device=backend.device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", backends("swiglu"))
def test_extreme_gates(backend: Backend, dtype: torch.dtype, activation: str) -> None:
    gates = [-1e4, -100.0, -88.5, -0.0, 0.0, 1e-30, 88.5, 100.0, 1e4]
    gate = torch.tensor(gates, dtype=dtype, device=backend.device, requires_grad=True)
    up = torch.ones_like(gate).requires_grad_()
    y = swiglu(gate, up, activation=activation, backend=backend.name)
    expected = reference.swiglu(gate, up, activation)
    torch.testing.assert_close(y, expected)
    for actual, wanted in zip(
        torch.autograd.grad(y.sum(), (gate, up)), torch.autograd.grad(expected.sum(), (gate, up)), strict=True
    ):
        torch.testing.assert_close(actual, wanted)


def test_repeatable_and_independent_of_threads() -> None:
    inputs = _inputs((50, 1999), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            y = swiglu(*inputs, backend="cpp")
            runs.append([y, *torch.autograd.grad(y.float().square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_reference(activation: str) -> None:
    inputs = _inputs((4, 5), torch.float64)
    torch.autograd.gradcheck(lambda gate, up: reference.swiglu(gate, up, activation), inputs)


@pytest.mark.parametrize("shape", [(3, 8), (0, 8)])
@pytest.mark.parametrize("backend", backends("swiglu"))
def test_opcheck(backend: Backend, shape: tuple[int, ...]) -> None:
    ops = torch.ops.forge_triton if backend.name == "triton" else torch.ops.forge
    gate, up = _inputs(shape, torch.float32, backend.device)
    torch.library.opcheck(ops.swiglu.default, (gate, up, "gelu_tanh"))
    detached = (gate.detach(), gate.detach(), up.detach())
    torch.library.opcheck(ops.swiglu_backward.default, (*detached, "silu"))


@pytest.mark.parametrize("backend", backends("swiglu"))
def test_compiles_without_graph_break_and_checkpoints(backend: Backend) -> None:
    def function(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return swiglu(gate, up, backend=backend.name) * 2

    inputs = _inputs((6, 16), torch.float32, backend.device)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for y in (compiled(*inputs), checkpoint(function, *inputs, use_reentrant=False)):
        actual = torch.autograd.grad(y.square().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"up: got shape \[3\], expected that of gate, \[4\]"):
        swiglu(torch.ones(4), torch.ones(3))
    with pytest.raises(ValueError, match=r"up: got torch\.bfloat16, expected the dtype of gate"):
        swiglu(torch.ones(4), torch.ones(4).bfloat16())
    with pytest.raises(ValueError, match="activation: got 'relu', expected 'silu' or 'gelu_tanh'"):
        swiglu(torch.ones(4), torch.ones(4), activation="relu")
    with pytest.raises(ValueError, match="backend 'cpp' cannot take"):
        swiglu(torch.ones(4).double(), torch.ones(4).double(), backend="cpp")
