"""packed_attention by the Gluon kernel: on a Hopper GPU, and what can be said of it without one."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from forge_core.kernels import PackPlan, available_backends, library, packed_attention
from forge_core.kernels import attention_hopper as hopper
from forge_core.kernels.attention_call import AttentionCall
from forge_core.kernels.gpu import attention_blocks
from tests.tolerance import check_op

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 and library.TRITON_INSTALLED
on_hopper = [pytest.mark.gpu, pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU and triton")]
NAMES = [pytest.param(name, marks=on_hopper) for name in hopper.NAMES]
# Empty documents, documents of one tile and of many, lengths that no tile divides, and a tail of no document.
BOUNDS, TOKENS = [0, 0, 300, 310, 311, 1600, 1690], 1703


def _inputs(q_heads: int, kv_heads: int, d: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(TOKENS, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def _run(inputs: list[Tensor], name: str, planned: bool = True, **options: Any) -> list[Tensor]:
    inputs = [x.detach().cuda().requires_grad_() for x in inputs]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    plan = PackPlan(bounds.numpy()) if planned else None
    out = packed_attention(*inputs, bounds.cuda(), plan=plan, backend=name, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


# d, heads, dtype, options; every line is a variant that takes seconds to compile
CASES: list[tuple[int, tuple[int, int], torch.dtype, dict[str, Any]]] = [
    (128, (8, 2), torch.bfloat16, {}),
    (128, (8, 2), torch.float16, {"causal": False, "window": 250, "scale": -0.2}),
    (128, (4, 4), torch.bfloat16, {"window": 200}),
    (128, (7, 1), torch.bfloat16, {"window": 200, "softcap": 20.0}),
    (128, (8, 2), torch.bfloat16, {"softcap": 20.0}),
    (64, (16, 1), torch.bfloat16, {}),
    (64, (64, 1), torch.bfloat16, {"window": 1}),
    (80, (3, 1), torch.bfloat16, {}),
    (96, (32, 1), torch.float16, {"causal": False}),
    (256, (4, 2), torch.bfloat16, {}),
    (256, (2, 2), torch.bfloat16, {"window": 100, "softcap": 50.0}),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_matches_reference(name: str, case: tuple[int, tuple[int, int], torch.dtype, dict[str, Any]]) -> None:
    d, heads, dtype, options = case

    def attend(q: Tensor, k: Tensor, v: Tensor, name: str = name) -> Tensor:
        bounds = torch.tensor(BOUNDS, dtype=torch.int32)
        plan = PackPlan(bounds.numpy()) if name != "reference" else None
        return packed_attention(q, k, v, bounds.to(q.device), plan=plan, backend=name, **options)

    check_op(attend, lambda q, k, v: attend(q, k, v, "reference"), _inputs(*heads, d, dtype), device="cuda")


@pytest.mark.parametrize(
    ("d", "heads", "options"), [(128, (8, 2), {}), (64, (4, 4), {"window": 300}), (128, (2, 2), {}), (256, (2, 1), {})]
)
@pytest.mark.parametrize("name", NAMES)
def test_documents_that_continue_others(
    name: str, d: int, heads: tuple[int, int], options: dict[str, Any], parents: tuple[int, ...] = (-1, -1, 1, 1, 1, 4)
) -> None:
    bounds, tree = (torch.tensor(x, dtype=torch.int32) for x in (BOUNDS, parents))

    def attend(q: Tensor, k: Tensor, v: Tensor, name: str = name) -> Tensor:
        plan = PackPlan(bounds.numpy(), parents=tree.numpy()) if name != "reference" else None
        of = {"parents": tree.to(q.device), "plan": plan, "backend": name}
        return packed_attention(q, k, v, bounds.to(q.device), **of, **options)

    check_op(attend, lambda q, k, v: attend(q, k, v, "reference"), _inputs(*heads, d), device="cuda")


@pytest.mark.parametrize("name", NAMES)
def test_repeats_bitwise_with_and_without_a_plan(name: str) -> None:
    inputs = _inputs(8, 2, 128)
    expected = _run(inputs, name)
    for i in range(20):  # a race would not show every time
        assert all(torch.equal(a, b) for a, b in zip(_run(inputs, name, bool(i % 2)), expected, strict=True))
    assert torch.equal(_run(inputs, "gluon")[0], expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_rows_past_the_last_document_are_not_read(name: str) -> None:
    inputs = _inputs(4, 2, 64)
    with torch.no_grad():
        for x in inputs:
            x[BOUNDS[-1] :] = torch.nan
    for x in _run(inputs, name):
        assert torch.isfinite(x).all() and (x[BOUNDS[-1] :] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_views_of_a_fused_projection(name: str) -> None:
    fused = torch.randn(TOKENS, 8, 128, dtype=torch.bfloat16)
    views = list(fused.split([4, 2, 2], 1))
    for a, b in zip(_run(views, name), _run([x.contiguous() for x in views], name), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_in_a_compiled_graph_and_in_a_cuda_graph(name: str) -> None:
    inputs = [x.detach().cuda() for x in _inputs(4, 2, 128)]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, bounds, backend=name)

    expected = attend(*inputs)
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(*inputs), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*inputs)
    captured.zero_()
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.parametrize("name", NAMES[:1])
def test_auto_times_both_tiers_once(name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from forge_core.kernels.gpu import tuning

    monkeypatch.setenv("FORGE_TUNING_CACHE", str(tmp_path / "tuning.json"))
    monkeypatch.delenv("FORGE_TUNING", raising=False)
    monkeypatch.setattr(tuning, "_choices", None)
    inputs = [x.detach().cuda() for x in _inputs(8, 2, 128)]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    out = packed_attention(*inputs, bounds)
    # A tier that disagrees with Triton is named in a warning, and not chosen.
    (choice,) = (way for key, way in tuning._known().items() if " blocks " not in key)
    assert choice in ("triton", *hopper.NAMES)
    assert torch.equal(packed_attention(*inputs, bounds, backend=choice), out)
    with mock.patch.object(tuning, "_time", side_effect=AssertionError("measured again")):
        packed_attention(*inputs, bounds)


def test_says_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_backends("packed_attention")["packed_attention"][:6] == ["cpp", "triton", *hopper.NAMES]
    x, bounds = torch.ones(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="gluon: runs on a Hopper GPU, got a tensor on cpu"):
        packed_attention(x, x, x, bounds, backend="gluon")
    on_gpu = mock.Mock(dtype=torch.float32, shape=(4, 128, 300), device=mock.Mock(type="cuda"))
    keys = mock.Mock(shape=(4, 1, 300))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    found = "; ".join(hopper.reasons(AttentionCall(on_gpu, keys, keys, bounds, None, True, None, None, 1.0, bounds)))
    for part in ("takes bfloat16", "steps of 8 up to 256, got 300", "up to 64 query heads", "wants plan="):
        assert part in found
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "got 10.0" in hopper.reasons(AttentionCall(on_gpu, keys, keys, bounds, None, True, None, None, 1.0))[0]


def test_what_the_backward_kernels_take() -> None:
    for d, heads, expected in (
        (128, (8, 2), (True, True)), (64, (64, 2), (True, True)), (96, (8, 2), (True, False)),
        (128, (7, 1), (True, False)), (128, (64, 1), (True, False)), (256, (4, 2), (False, False)),
    ):  # fmt: skip
        q, k = torch.empty(4, heads[0], d), torch.empty(4, heads[1], d)
        taken = attention_blocks.hopper_backward_takes(q, k)
        assert taken == expected, (d, heads)
        triton = attention_blocks.hopper_tile_sizes(q, k, False, False)
        sizes = attention_blocks.hopper_tile_sizes(q, k, *taken)
        assert sizes[0] == triton[0] and [a != b for a, b in zip(sizes[1:], triton[1:], strict=True)] == list(taken)


@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="triton is not installed")
def test_fakes() -> None:
    q, k = torch.ones(20, 6, 8, dtype=torch.bfloat16), torch.ones(20, 2, 8, dtype=torch.bfloat16)
    tiles = torch.zeros(3, 8, dtype=torch.int32)
    with torch._subclasses.FakeTensorMode() as mode:
        q, k, tiles = (mode.from_tensor(x) for x in (q, k, tiles))
        op = torch.ops.forge_triton.packed_attention_hopper
        out, lse = op(q, k, k, tiles, tiles, tiles, True, 0, 0.0, 1.0, False, True, True)
        backward = torch.ops.forge_triton.packed_attention_hopper_backward
        gradients = backward(q, q, k, k, out, lse, tiles, tiles, True, 0, 0.0, 1.0, True, False)
        leaves = [x.detach().requires_grad_() for x in (q, k, k)]
        for ways in ((True, True), (False, False), (True, False, tiles, tiles, tiles)):
            result = op(*leaves, tiles, tiles, tiles, True, 0, 0.0, 1.0, False, *ways)[0]
            gradients = [*gradients, *torch.autograd.grad(result, leaves, result)]
    assert [x.shape for x in gradients] == [q.shape, k.shape, k.shape] * 4
    assert out.shape == q.shape and lse.shape == (1, 2, 60) and lse.dtype == torch.float32
