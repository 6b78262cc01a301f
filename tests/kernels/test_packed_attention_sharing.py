"""packed_attention where documents continue others: equal to separate rows, in value and gradient."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_core.kernels import PackPlan, document_positions, packed_attention
from tests.backends import Backend, backends
from tests.tolerance import check_op

BACKENDS = backends("packed_attention")
CPP = Backend("cpp", "cpu")
DTYPES = [torch.float32, torch.bfloat16]
# window, softcap
OPTIONS = [(None, None), (6, None), (40, 2.0), (1, None)]
# lengths and parents: a prompt and its candidates, one of them empty and the prompt of odd length; two groups, their
# documents interleaved; chains, one of them through an empty document; candidates of an empty prompt.
GROUP = ([13, 7, 0, 9, 1], [-1, 0, 0, 0, 0])
TREES = [
    GROUP,
    ([5, 70, 3, 66, 4, 2], [-1, -1, 0, 1, 1, 0]),
    ([4, 0, 3, 5, 6, 2], [-1, 0, 1, 2, 2, 0]),
    ([0, 4, 3], [-1, 0, 0]),
]


def _bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int32).cumsum(0)], dtype=torch.int32)


def _inputs(tokens: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def _separate_rows(lengths: list[int], parents: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Every document behind copies of its ancestors: rows to gather, cu_seqlens, and which of them are its own."""
    bounds = _bounds(lengths).tolist()
    seen: list[list[int]] = []
    own: list[bool] = []
    for (begin, end), parent in zip(pairwise(bounds), parents, strict=True):
        before = seen[parent] if parent >= 0 else []
        seen.append([*before, *range(begin, end)])
        own += [False] * len(before) + [True] * (end - begin)
    rows = torch.tensor([row for document in seen for row in document], dtype=torch.int64)
    return rows, _bounds([len(document) for document in seen]), torch.tensor(own, dtype=torch.bool)


def _shared(lengths: list[int], parents: list[int], backend: Backend, planned: bool = True, **options: Any) -> Any:
    cu_seqlens, tree = _bounds(lengths), torch.tensor(parents, dtype=torch.int32)
    planned = planned and backend.name != "reference"
    plan = PackPlan(cu_seqlens.numpy(), parents=tree.numpy()) if planned else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        on_device = {"cu_seqlens": cu_seqlens.to(q.device), "parents": tree.to(q.device)}
        return packed_attention(q, k, v, **on_device, plan=plan, backend=backend.name, **options)

    return attend


def _check(
    inputs: list[Tensor], lengths: list[int], parents: list[int], backend: Backend, planned: bool = True, **options: Any
) -> None:
    """Against separate rows, by the reference."""
    rows, cu_seqlens, own = _separate_rows(lengths, parents)

    def separate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copies = (x[rows.to(q.device)] for x in (q, k, v))
        out = packed_attention(*copies, cu_seqlens.to(q.device), backend="reference", **options)
        return torch.cat([out[own.to(q.device)], q.new_zeros(q[sum(lengths) :].shape)])

    check_op(_shared(lengths, parents, backend, planned, **options), separate, inputs, device=backend.device)


def random_tree(seed: int, longest: int = 60) -> tuple[list[int], list[int]]:
    """Lengths and parents of up to 9 documents."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, 10, (), generator=generator))
    lengths = torch.randint(0, longest, (count,), generator=generator).tolist()
    parents = [int(torch.randint(-1, d, (), generator=generator)) if d else -1 for d in range(count)]
    return lengths, parents


@pytest.mark.parametrize("tree", [*TREES, random_tree(0)], ids=str)
@pytest.mark.parametrize(("window", "softcap"), OPTIONS)
def test_reference_equals_separate_rows(
    tree: tuple[list[int], list[int]], window: int | None, softcap: float | None
) -> None:
    lengths, parents = tree
    inputs = _inputs(sum(lengths) + 3, 4, 2, 5, torch.float64)
    reference = Backend("reference", "cpu")
    rows, cu_seqlens, own = _separate_rows(lengths, parents)
    options: dict[str, Any] = {"window": window, "softcap": softcap}
    actual = _shared(lengths, parents, reference, **options)(*inputs)
    copies = (x[rows] for x in inputs)
    expected = packed_attention(*copies, cu_seqlens, backend="reference", **options)[own]
    torch.testing.assert_close(actual[: len(expected)], expected)
    assert (actual[len(expected) :] == 0).all()
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(actual[: len(expected)], inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference_of_separate_rows(
    backend: Backend, tree: tuple[list[int], list[int]], dtype: torch.dtype
) -> None:
    _check(_inputs(sum(tree[0]) + 3, 4, 2, 7, dtype), *tree, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "softcap"), OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference_with_options(
    backend: Backend, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    options = {"window": window, "softcap": softcap, "scale": -0.5}
    _check(_inputs(sum(GROUP[0]), 3, 1, 6, dtype), *GROUP, backend, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(12))
def test_matches_reference_on_random_trees(seed: int, dtype: torch.dtype) -> None:
    lengths, parents = random_tree(seed + 1, longest=90)
    window = [None, 33, 3][seed % 3]
    inputs = _inputs(sum(lengths) + seed % 4, 6, 3, 12, dtype)
    _check(inputs, lengths, parents, CPP, planned=seed % 2 == 0, window=window)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.values[0].name != "cpp"])
def test_matches_reference_on_random_trees_on_gpus(backend: Backend, seed: int) -> None:
    lengths, parents = random_tree(seed + 20)
    inputs = _inputs(sum(lengths) + 2, 4, 2, 16, DTYPES[seed % 2])
    _check(inputs, lengths, parents, backend, planned=seed % 2 == 0, window=[None, 30][seed // 2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 700])
def test_matches_reference_over_several_tasks(window: int | None, dtype: torch.dtype) -> None:
    # A prompt of several tasks, candidates of several groups, one candidate longer than a task and one with a
    # continuation of its own.
    lengths = [1100, 200, 300, 250, 1030, 260, 40]
    _check(_inputs(sum(lengths), 1, 1, 4, dtype), lengths, [-1, 0, 0, 0, 0, 0, 2], CPP, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bitwise_for_any_number_of_threads(dtype: torch.dtype) -> None:
    lengths, parents = [300, 200, 250, 250, 90, 400], [-1, 0, 0, 0, -1, 4]
    inputs = _inputs(sum(lengths), 4, 2, 16, dtype)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = _shared(lengths, parents, CPP)(*inputs)
            runs.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_siblings_do_not_see_each_other() -> None:
    inputs = [x.detach() for x in _inputs(20, 2, 1, 8, torch.float32)]
    attend = _shared([8, 6, 6], [-1, 0, 0], CPP)
    before = attend(*inputs)
    for x in inputs:
        x[8:14] = torch.nan
    assert torch.equal(attend(*inputs)[14:], before[14:]) and torch.equal(attend(*inputs)[:8], before[:8])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend: Backend) -> None:
    inputs = [x.detach().to(backend.device).requires_grad_() for x in _inputs(84, 4, 2, 8, torch.float32)]
    cu_seqlens, parents = _bounds([49, 15, 18]), torch.tensor([-1, 0, 0], dtype=torch.int32)
    tree = {"cu_seqlens": cu_seqlens.to(backend.device), "parents": parents.to(backend.device)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, **tree, window=40, backend=backend.name) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_opcheck() -> None:
    q, k, v = _inputs(20, 4, 2, 8, torch.float32)
    cu_seqlens, parents = _bounds([8, 6, 3]), torch.tensor([-1, 0, 0], dtype=torch.int32)
    options = (cu_seqlens, None, True, 9, 2.0, 0.3, parents)
    torch.library.opcheck(torch.ops.forge.packed_attention.default, (q, k, v, *options))


@pytest.mark.parametrize("seed", range(8))
def test_positions(seed: int) -> None:
    lengths, parents = random_tree(seed)
    expected: list[int] = []
    before: list[int] = []
    for length, parent in zip(lengths, parents, strict=True):
        before.append(before[parent] + lengths[parent] if parent >= 0 else 0)
        expected += range(before[-1], before[-1] + length)
    tree = torch.tensor(parents, dtype=torch.int32)
    positions = document_positions(sum(lengths) + 2, _bounds(lengths), tree)
    assert positions.dtype == torch.int64 and positions.tolist() == [*expected, 0, 1]
    flat = document_positions(sum(lengths) + 2, _bounds(lengths))
    assert flat.tolist() == [*(i for length in lengths for i in range(length)), 0, 1]


def test_errors_name_the_argument() -> None:
    x, cu_seqlens = torch.ones(6, 2, 8), _bounds([3, 3])
    good = torch.tensor([-1, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"parents: got torch\.int64 of shape \[2\], expected int32 \[documents\]"):
        packed_attention(x, x, x, cu_seqlens, parents=good.long())
    with pytest.raises(ValueError, match=r"parents: got torch\.int32 of shape \[1\]"):
        packed_attention(x, x, x, cu_seqlens, parents=good[:1])
    with pytest.raises(ValueError, match="causal: got False with parents"):
        packed_attention(x, x, x, cu_seqlens, parents=good, causal=False)
    with pytest.raises(ValueError, match="plan: got one made without parents, expected one with them"):
        packed_attention(x, x, x, cu_seqlens, parents=good, plan=PackPlan(cu_seqlens.numpy()))
    with pytest.raises(ValueError, match="plan: got one made with parents, expected one without them"):
        packed_attention(x, x, x, cu_seqlens, plan=PackPlan(cu_seqlens.numpy(), parents=good.numpy()))
    for bad in ([-1, 1], [-2, 0]):
        for backend in ("cpp", "reference"):
            with pytest.raises((ValueError, RuntimeError), match="parents: got"):
                packed_attention(x, x, x, cu_seqlens, parents=torch.tensor(bad, dtype=torch.int32), backend=backend)
