"""packed_attention's C++ loops where those of one instruction set differ from those of another."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from forge_core.kernels import packed_attention
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]


def _inputs(tokens: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def _cu_seqlens(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def _check(inputs: list[Tensor], bounds: list[int], **options) -> None:  # type: ignore[no-untyped-def]
    def attend(backend: str) -> Callable[..., Tensor]:
        return lambda q, k, v: packed_attention(q, k, v, _cu_seqlens(bounds), backend=backend, **options)

    check_op(attend("cpp"), attend("reference"), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_matches_reference_with_any_scale(softcap: float | None, scale: float, dtype: torch.dtype) -> None:
    _check(_inputs(50, 4, 2, 8, dtype), [0, 0, 1, 8, 30, 47], scale=scale, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 33), (False, 200)])
@pytest.mark.parametrize("d", [33, 80])
def test_matches_reference_over_several_key_tiles(d: int, causal: bool, window: int | None, dtype: torch.dtype) -> None:
    _check(_inputs(461, 3, 1, d, dtype), [0, 451, 460], causal=causal, window=window)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, 333)])
def test_long_documents_in_bfloat16_are_several_tasks(causal: bool, window: int | None) -> None:
    _check(_inputs(4300, 1, 1, 4, torch.bfloat16), [0, 4200], causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference_beside_unread_rows(dtype: torch.dtype) -> None:
    # Odd sizes: what a pair of elements or of rows has beyond the last one must not be read either.
    inputs = _inputs(50, 4, 2, 7, dtype)
    with torch.no_grad():
        for x in inputs:
            x[47:] = torch.nan
    out = packed_attention(*inputs, _cu_seqlens([0, 47]), backend="cpp")
    for x in [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]:
        assert torch.isfinite(x).all() and (x[47:] == 0).all()


def test_gradients_in_bfloat16_are_as_accurate_as_sdpa() -> None:
    inputs, bounds = _inputs(600, 4, 1, 64, torch.bfloat16), _cu_seqlens([0, 600])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    exact = packed_attention(*wide, bounds)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16)
    expected = torch.autograd.grad(exact, wide, upstream.double())

    def errors(out: Tensor) -> Tensor:
        found = torch.autograd.grad(out, inputs, upstream)
        return torch.stack([(a.double() - b).norm() for a, b in zip(found, expected, strict=True)])

    q, k, v = (x.transpose(0, 1)[None] for x in inputs)
    sdpa = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
    assert (errors(packed_attention(*inputs, bounds, backend="cpp")) <= errors(sdpa)).all()
