import pytest
import torch

from forge_core.kernels import library, reference, rms_norm
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
# One row, odd sizes below and above every vector width, more rows than one partial sum of dweight, no rows at all.
SHAPES = [(1, 1), (3, 7), (5, 17), (130, 64), (2, 3, 576), (0, 8)]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    return [x, weight]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_offset", [0.0, 1.0])
def test_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, weight_offset: float) -> None:
    check_op(
        lambda x, w: rms_norm(x, w, eps=1e-5, weight_offset=weight_offset, backend="cpp"),
        lambda x, w: reference.rms_norm(x, w, 1e-5, weight_offset),
        _inputs(shape, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_contiguous(dtype: torch.dtype) -> None:
    x = torch.randn(33, 12, dtype=dtype).t().requires_grad_()
    weight = torch.randn(66, dtype=dtype)[::2].requires_grad_()
    check_op(
        lambda x, w: rms_norm(x, w, backend="cpp"),
        lambda x, w: reference.rms_norm(x, w, 1e-6, 0.0),
        [x, weight],
    )


def test_frozen_weight_gets_no_gradient() -> None:
    x, weight = _inputs((9, 16), torch.float32)
    rms_norm(x, weight.detach(), backend="cpp").sum().backward()
    assert x.grad is not None and weight.grad is None


def test_extreme_rows_stay_finite() -> None:
    x = torch.tensor([[0.0] * 8, [1e-30] * 8, [1e15] * 8])
    assert torch.isfinite(rms_norm(x, torch.ones(8), backend="cpp")).all()


def test_repeatable_bitwise() -> None:
    x, weight = _inputs((300, 40), torch.bfloat16)
    runs = [torch.autograd.grad(rms_norm(x, weight).float().square().sum(), (x, weight)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_gradcheck_reference() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: reference.rms_norm(x, w, 1e-6, 1.0), (x, weight))


@pytest.mark.parametrize("shape", [(5, 8), (0, 8)])
def test_opcheck(shape: tuple[int, ...]) -> None:
    x, weight = _inputs(shape, torch.float32)
    torch.library.opcheck(torch.ops.forge.rms_norm.default, (x, weight, 1e-6, 0.0))
    rstd = torch.rand(shape[0])
    torch.library.opcheck(
        torch.ops.forge.rms_norm_backward.default, (x.detach(), x.detach(), weight.detach(), rstd, 0.0, True)
    )


def test_compiles_without_graph_break() -> None:
    x, weight = _inputs((6, 16), torch.float32)
    compiled = torch.compile(lambda x, w: rms_norm(x, w) * 2, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad((rms_norm(x, weight) * 2).sum(), (x, weight))
    actual = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
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


# On the GPU: one row, odd sizes, rows of a warp and of a block, of one, two and four packs a thread, too long to keep
# in registers, more rows than partial sums of dweight, no rows at all.
GPU_SHAPES = [(1, 1), (3, 7), (5, 17), (3000, 128), (600, 576), (40, 4096), (9, 8192), (3, 20000), (5, 40000), (0, 8)]


@pytest.mark.gpu
@pytest.mark.skipif(not library.cuda_library_loaded(), reason=library.CUDA_LIBRARY_MISSING)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", GPU_SHAPES)
@pytest.mark.parametrize("aligned", [True, False])
def test_cuda_matches_reference(shape: tuple[int, ...], dtype: torch.dtype, aligned: bool) -> None:
    def on_gpu(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = x.cuda()
        if not aligned:  # starts one element into its storage: no 16-byte loads
            x = torch.cat((x.new_zeros(1), x.reshape(-1)))[1:].view(shape)
        return rms_norm(x, weight.cuda(), eps=1e-5, weight_offset=1.0, backend="cuda").cpu()

    check_op(on_gpu, lambda x, w: reference.rms_norm(x, w, 1e-5, 1.0), _inputs(shape, dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not library.cuda_library_loaded(), reason=library.CUDA_LIBRARY_MISSING)
def test_cuda_uses_the_current_stream_and_is_repeatable() -> None:
    x, weight = (t.detach().cuda().requires_grad_() for t in _inputs((20000, 1024), torch.bfloat16))
    expected = torch.autograd.grad(rms_norm(x, weight, backend="cuda").float().square().sum(), (x, weight))
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # work on another stream would read copies that are not made yet
        xs, weights = (t.detach().clone().requires_grad_() for t in (x, weight))
        actual = torch.autograd.grad(rms_norm(xs, weights, backend="cuda").float().square().sum(), (xs, weights))
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not library.cuda_library_loaded(), reason=library.CUDA_LIBRARY_MISSING)
def test_cuda_opcheck() -> None:
    x, weight = (t.detach().cuda() for t in _inputs((5, 8), torch.float32))
    torch.library.opcheck(torch.ops.forge.rms_norm.default, (x.requires_grad_(), weight.requires_grad_(), 1e-6, 0.0))
    arguments = (x.detach(), x.detach(), weight.detach(), torch.rand(5, device="cuda"), 0.0, True)
    torch.library.opcheck(torch.ops.forge.rms_norm_backward.default, arguments)
