import pytest
import torch
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import reference, swiglu
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
ACTIVATIONS = ["silu", "gelu_tanh"]
# One element, odd sizes around every vector width, several dimensions, more than one task, nothing.
SHAPES = [(1,), (3, 7), (5, 17), (2, 3, 96), (9, 4001), (0, 8), (8, 0)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    return [(torch.randn(shape) * 2).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    check_op(
        lambda gate, up: swiglu(gate, up, activation=activation, backend="cpp"),
        lambda gate, up: reference.swiglu(gate, up, activation),
        _inputs(shape, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_non_contiguous(dtype: torch.dtype, activation: str) -> None:
    gate = torch.randn(33, 12, dtype=dtype).t().requires_grad_()
    up = torch.randn(12, 66, dtype=dtype)[:, ::2].requires_grad_()
    check_op(
        lambda gate, up: swiglu(gate, up, activation=activation, backend="cpp"),
        lambda gate, up: reference.swiglu(gate, up, activation),
        [gate, up],
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_gates(dtype: torch.dtype, activation: str) -> None:
    gate = torch.tensor([-1e4, -100.0, -88.5, -0.0, 0.0, 1e-30, 88.5, 100.0, 1e4], dtype=dtype, requires_grad=True)
    up = torch.ones_like(gate).requires_grad_()
    y = swiglu(gate, up, activation=activation, backend="cpp")
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
def test_opcheck(shape: tuple[int, ...]) -> None:
    gate, up = _inputs(shape, torch.float32)
    torch.library.opcheck(torch.ops.forge.swiglu.default, (gate, up, "gelu_tanh"))
    detached = (gate.detach(), gate.detach(), up.detach())
    torch.library.opcheck(torch.ops.forge.swiglu_backward.default, (*detached, "silu"))


def test_compiles_without_graph_break() -> None:
    inputs = _inputs((6, 16), torch.float32)
    compiled = torch.compile(lambda gate, up: swiglu(gate, up) * 2, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad((swiglu(*inputs) * 2).sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_activation_checkpointing() -> None:
    inputs = _inputs((6, 16), torch.float32)
    expected = torch.autograd.grad(swiglu(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(checkpoint(swiglu, *inputs, use_reentrant=False).square().sum(), inputs)
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
