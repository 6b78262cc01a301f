from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import reference, rope
from tests.backends import Backend, backends
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
# tokens, query heads, key heads, d: one row, odd halves, grouped queries, more tokens than one task, nothing.
SHAPES = [(1, 1, 1, 2), (3, 2, 1, 14), (5, 9, 3, 64), (70, 4, 2, 34), (0, 2, 1, 8), (4, 2, 0, 8), (4, 2, 1, 0)]


def _inputs(tokens: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list:
    torch.manual_seed(0)
    q = torch.randn(tokens, q_heads, d, dtype=dtype, requires_grad=True)
    k = torch.randn(tokens, kv_heads, d, dtype=dtype, requires_grad=True)
    angles = torch.randn(tokens, d // 2) * 3
    return [q, k, angles.cos(), angles.sin()]


def _cpp(q, k, cos, sin):  # type: ignore[no-untyped-def]
    return rope(q, k, cos, sin, backend="cpp")


def _on(backend: Backend, inputs: list) -> list:
    return [x.detach().to(backend.device).requires_grad_(x.requires_grad) for x in inputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", backends("rope"))
def test_matches_reference(backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_op(partial(rope, backend=backend.name), reference.rope, _inputs(*shape, dtype), device=backend.device)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("shape", [(3000, 32, 8, 128), (700, 9, 3, 64), (300, 64, 8, 256), (300, 71, 1, 80)])
@pytest.mark.parametrize("backend", backends("rope", gpu_only=True))
def test_on_gpu_matches_reference(backend: Backend, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check_op(partial(rope, backend=backend.name), reference.rope, _inputs(*shape, dtype), device=backend.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("rope"))
def test_views_of_a_fused_projection(backend: Backend, dtype: torch.dtype) -> None:
    q, k, _ = torch.randn(11, 8, 16, dtype=dtype).split((5, 2, 1), dim=1)
    angles = torch.randn(11, 8)
    inputs = [q.requires_grad_(), k.requires_grad_(), angles.cos(), angles.sin()]
    check_op(partial(rope, backend=backend.name), reference.rope, inputs, device=backend.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends("rope"))
def test_non_contiguous(backend: Backend, dtype: torch.dtype) -> None:
    q = torch.randn(3, 10, 16, dtype=dtype).transpose(0, 1).requires_grad_()
    k = torch.randn(10, 3, 32, dtype=dtype)[..., ::2].requires_grad_()
    angles = torch.randn(8, 10).t()
    inputs = [q, k, angles.cos(), angles.sin()]
    check_op(partial(rope, backend=backend.name), reference.rope, inputs, device=backend.device)


@pytest.mark.parametrize("backend", backends("rope"))
def test_is_the_rotation_by_position(backend: Backend) -> None:
    # Scores depend on the distance of the positions only (Su et al., equation 11).
    q, k = torch.randn(1, 1, 8).expand(12, 1, 8), torch.randn(1, 1, 8).expand(12, 1, 8)
    angles = torch.arange(12.0)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])
    q, k = rope(*_on(backend, [q, k, angles.cos(), angles.sin()]), backend=backend.name)
    scores = torch.einsum("ihd,jhd->ij", q, k)
    torch.testing.assert_close(scores[2:, 5:], scores[:-2, 3:-2])


@pytest.mark.parametrize("backend", backends("rope"))
def test_gradient_of_one_output_only(backend: Backend) -> None:
    q, k, cos, sin = _on(backend, _inputs(4, 2, 1, 8, torch.float32))
    rope(q, k, cos, sin, backend=backend.name)[0].sum().backward()
    assert q.grad is not None and (k.grad is None or not k.grad.any())


def test_repeatable_and_independent_of_threads() -> None:
    inputs = _inputs(200, 3, 1, 32, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            q, k = _cpp(*inputs)
            runs.append([q, k, *torch.autograd.grad((q.float() ** 2).sum() + (k.float() ** 3).sum(), inputs[:2])])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_gradcheck_reference() -> None:
    q, k, cos, sin = _inputs(3, 2, 1, 6, torch.float64)
    torch.autograd.gradcheck(reference.rope, (q, k, cos.double(), sin.double()))


@pytest.mark.parametrize("tokens", [5, 0])
@pytest.mark.parametrize("backend", backends("rope"))
def test_opcheck(backend: Backend, tokens: int) -> None:
    ops = torch.ops.forge_triton if backend.name == "triton" else torch.ops.forge
    torch.library.opcheck(ops.rope.default, (*_on(backend, _inputs(tokens, 2, 1, 8, torch.float32)), False))


@pytest.mark.parametrize("backend", backends("rope"))
def test_compiles_without_graph_break_and_checkpoints(backend: Backend) -> None:
    def function(*inputs: torch.Tensor) -> torch.Tensor:
        return rope(*inputs, backend=backend.name)[0] * 2

    inputs = _on(backend, _inputs(6, 2, 1, 16, torch.float32))
    expected = torch.autograd.grad((function(*inputs) ** 2).sum(), inputs[0])
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for y in (compiled(*inputs), checkpoint(function, *inputs, use_reentrant=False)):
        assert torch.equal(torch.autograd.grad((y**2).sum(), inputs[0])[0], expected[0])


def test_tables_that_require_a_gradient_run_the_reference() -> None:
    q, k, cos, sin = _inputs(4, 2, 1, 8, torch.float32)
    cos.requires_grad_()
    rope(q, k, cos, sin)[0].sum().backward()
    assert cos.grad is not None
    with pytest.raises(ValueError, match="gives cos and sin no gradient"):
        rope(q, k, cos, sin, backend="cpp")


def test_errors_name_the_argument() -> None:
    q, k, cos, sin = _inputs(4, 2, 1, 8, torch.float32)
    with pytest.raises(ValueError, match=r"q: got shape \[4, 2, 7\], expected .* even d"):
        rope(q[..., :7], k, cos, sin)
    with pytest.raises(ValueError, match=r"k: got shape \[3, 1, 8\]"):
        rope(q, k[:3], cos, sin)
    with pytest.raises(ValueError, match=r"k: got torch\.bfloat16"):
        rope(q, k.bfloat16(), cos, sin)
    with pytest.raises(ValueError, match=r"sin: got shape \[4, 3\], expected \[4, 4\]"):
        rope(q, k, cos, sin[:, :3])
    with pytest.raises(ValueError, match=r"cos: got torch\.bfloat16, expected torch\.float32"):
        rope(q.bfloat16(), k.bfloat16(), cos.bfloat16(), sin)
