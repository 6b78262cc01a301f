import pytest
import torch
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import reference, rms_norm
from tests.backends import Backend, backends
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
# One row, odd sizes below and above every vector width, more rows than one partial sum of dweight, rows too long to
# keep in registers, no rows at all.
SHAPES = [(1, 1), (3, 7), (5, 17), (130, 64), (2, 3, 576), (9, 8200), (3, 20000), (0, 8)]
# Besides, on a GPU: rows of a warp and of a block, of one, two and four packs a thread.
LARGE_SHAPES = [(3000, 128), (600, 576), (40, 4096), (9, 8192), (5, 40000)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    return [x, weight]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_matches_reference(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, weight_offset: float) -> None:
    check_op(
        lambda x, w: rms_norm(x, w, eps=1e-5, weight_offset=weight_offset, backend=backend.name),
        lambda x, w: reference.rms_norm(x, w, 1e-5, weight_offset),
        _inputs(shape, dtype),
        device=backend.device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_non_contiguous(backend: Backend, dtype: torch.dtype) -> None:
    x = torch.randn(33, 12, dtype=dtype).t().requires_grad_()
    weight = torch.randn(66, dtype=dtype)[::2].requires_grad_()
    check_op(
        lambda x, w: rms_norm(x, w, backend=backend.name),
        lambda x, w: reference.rms_norm(x, w, 1e-6, 0.0),
        [x, weight],
        device=backend.device,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_frozen_weight(backend: Backend, dtype: torch.dtype) -> None:
    x, weight = _inputs((9, 16), dtype)
    check_op(
        lambda x, w: rms_norm(x, w, backend=backend.name),
        lambda x, w: reference.rms_norm(x, w, 1e-6, 0.0),
        [x, weight.detach()],
        device=backend.device,
    )


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_extreme_rows_stay_finite(backend: Backend) -> None:
    x = torch.tensor([[0.0] * 8, [1e-30] * 8, [1e15] * 8], device=backend.device)
    assert torch.isfinite(rms_norm(x, torch.ones(8, device=backend.device), backend=backend.name)).all()


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_repeatable_bitwise(backend: Backend) -> None:
    x, weight = (t.detach().to(backend.device).requires_grad_() for t in _inputs((300, 40), torch.bfloat16))
    runs = [
        torch.autograd.grad(rms_norm(x, weight, backend=backend.name).float().square().sum(), (x, weight))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck_reference() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-6, 1.0), (x, weight))


@pytest.mark.parametrize("shape", [(5, 8), (0, 8)])
@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_opcheck(backend: Backend, shape: tuple[int, ...]) -> None:
    ops = torch.ops.forge_triton if backend.name == "triton" else torch.ops.forge
    x, weight = (t.detach().to(backend.device).requires_grad_() for t in _inputs(shape, torch.float32))
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-6, 0.0))
    rstd = torch.rand(shape[0], device=backend.device)
    torch.library.opcheck(ops.rms_norm_backward.default, (x.detach(), x.detach(), weight.detach(), rstd, 0.0, True))


@pytest.mark.parametrize("backend", backends("rms_norm"))
def test_compiles_without_graph_break_and_checkpoints(backend: Backend) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, weight, backend=backend.name) * 2

    x, weight = (t.detach().to(backend.device).requires_grad_() for t in _inputs((6, 16), torch.float32))
    expected = torch.autograd.grad(function(x, weight).sum(), (x, weight))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for y in (compiled(x, weight), checkpoint(function, x, weight, use_reentrant=False)):
        actual = torch.autograd.grad(y.sum(), (x, weight))
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"weight: got shape \[3\] with x of shape \[2, 4\]"):
        rms_norm(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(ValueError, match=r"weight: got torch\.float32, expected the dtype of x"):
        rms_norm(torch.ones(2, 4).bfloat16(), torch.ones(4))
    with pytest.raises(
        ValueError, match=r"backend 'cpp' cannot take.*\n.*takes float32 and bfloat16, got torch\.float64"
    ):
        rms_norm(torch.ones(2, 4).double(), torch.ones(4).double(), backend="cpp")
    with pytest.raises(ValueError, match="backend: got 'magic', expected 'auto' or one of"):
        rms_norm(torch.ones(2, 4), torch.ones(4), backend="magic")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", SHAPES + LARGE_SHAPES)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("backend", backends("rms_norm", gpu_only=True))
def test_on_gpu_matches_reference(backend: Backend, shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> None:
    def function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not aligned:  # starts one element into its storage: no 16-byte loads
            x = torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(shape)
        return rms_norm(x, weight, eps=1e-5, weight_offset=1.0, backend=backend.name)

    check_op(function, lambda x, w: reference.rms_norm(x, w, 1e-5, 1.0), _inputs(shape, dtype), device=backend.device)


@pytest.mark.parametrize("backend", backends("rms_norm", gpu_only=True))
def test_uses_the_current_stream_and_is_repeatable(backend: Backend) -> None:
    def gradients(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(rms_norm(x, weight, backend=backend.name).float().square().sum(), (x, weight))

    x, weight = (t.detach().cuda().requires_grad_() for t in _inputs((20000, 1024), torch.bfloat16))
    expected = gradients(x, weight)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on another stream would read copies that are not made yet
        actual = gradients(*(t.detach().clone().requires_grad_() for t in (x, weight)))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
