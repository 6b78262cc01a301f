import pytest
import torch
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import add_rms_norm, reference, rms_norm
from tests.backends import Backend, backends
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
# One row, odd sizes, more rows than one partial sum of dweight, rows too long to keep in registers, no rows at all.
SHAPES = [(1, 1), (5, 17), (130, 64), (2, 3, 576), (9, 8200), (3, 20000), (0, 8)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list:
    torch.manual_seed(0)
    return [torch.randn(s).to(device, dtype).requires_grad_() for s in (shape, shape, shape[-1:])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("backend", backends("add_rms_norm"))
def test_matches_reference(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, weight_offset: float) -> None:
    check_op(
        lambda x, r, w: add_rms_norm(x, r, w, eps=1e-5, weight_offset=weight_offset, backend=backend.name),
        lambda x, r, w: reference.add_rms_norm(x, r, w, 1e-5, weight_offset),
        _inputs(shape, dtype),
        device=backend.device,
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(600, 576), (600, 4096), (40, 8192), (40, 16384)])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("backend", backends("add_rms_norm", gpu_only=True))
def test_on_gpu_matches_reference(backend: Backend, frozen: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, weight = _inputs(shape, dtype)
    check_op(
        lambda x, r, w: add_rms_norm(x, r, w, backend=backend.name),
        lambda x, r, w: reference.add_rms_norm(x, r, w, 1e-6, 0.0),
        [x, residual, weight.requires_grad_(not frozen)],
        device=backend.device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("add_rms_norm"))
def test_frozen_weight_and_strides(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.randn(33, 12).to(dtype).t().requires_grad_()
    residual = torch.randn(12, 66).to(dtype)[:, ::2].requires_grad_()
    check_op(
        lambda x, r, w: add_rms_norm(x, r, w, backend=backend.name),
        lambda x, r, w: reference.add_rms_norm(x, r, w, 1e-6, 0.0),
        [x, residual, torch.randn(33).to(dtype)],
        device=backend.device,
    )


@pytest.mark.parametrize("backend", backends("add_rms_norm"))
def test_is_addition_then_norm(backend: Backend) -> None:
    x, residual, weight = _inputs((40, 64), torch.bfloat16, backend.device)
    y, total = add_rms_norm(x, residual, weight, backend=backend.name)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight, backend=backend.name))


@pytest.mark.parametrize("backend", backends("add_rms_norm"))
def test_gradient_of_one_output_only(backend: Backend) -> None:
    inputs = _inputs((6, 16), torch.float32, backend.device)
    for i in (0, 1):
        actual = torch.autograd.grad(add_rms_norm(*inputs, backend=backend.name)[i].square().sum(), inputs[:2])
        expected = torch.autograd.grad(reference.add_rms_norm(*inputs, 1e-6, 0.0)[i].square().sum(), inputs[:2])
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("shape", [(5, 8), (0, 8)])
@pytest.mark.parametrize("backend", [b for b in backends("add_rms_norm") if b.values[0].name == "triton"])
def test_opcheck(backend: Backend, shape: tuple[int, ...]) -> None:
    ops = torch.ops.forge_triton
    x, residual, weight = _inputs(shape, torch.float32, backend.device)
    torch.library.opcheck(ops.add_rms_norm.default, (x, residual, weight, 1e-6, 0.0))
    rstd = torch.rand(shape[0], device=backend.device)
    detached = (x.detach(), residual.detach(), x.detach(), weight.detach(), rstd, 0.0, True)
    torch.library.opcheck(ops.add_rms_norm_backward.default, detached)


@pytest.mark.parametrize("backend", backends("add_rms_norm"))
def test_compiles_without_graph_break_and_checkpoints(backend: Backend) -> None:
    def function(*inputs: torch.Tensor) -> torch.Tensor:
        y, total = add_rms_norm(*inputs, backend=backend.name)
        return y * 2 + total

    inputs = _inputs((6, 16), torch.float32, backend.device)
    expected = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for y in (compiled(*inputs), checkpoint(function, *inputs, use_reentrant=False)):
        actual = torch.autograd.grad(y.square().sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_gradcheck_reference() -> None:
    x, residual, weight = (t.detach().double().requires_grad_() for t in _inputs((4, 6), torch.float32))
    torch.autograd.gradcheck(lambda x, r, w: reference.add_rms_norm(x, r, w, 1e-6, 1.0), (x, residual, weight))


def test_errors_name_the_argument() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"residual: got torch\.float32 of shape \[2, 3\], expected .* \[2, 4\]"):
        add_rms_norm(x, torch.ones(2, 3), torch.ones(4))
    with pytest.raises(ValueError, match=r"weight: got shape \[3\]"):
        add_rms_norm(x, x, torch.ones(3))
