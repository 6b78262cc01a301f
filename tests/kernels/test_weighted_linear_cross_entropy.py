from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import MixingLoss, reference, weighted_linear_cross_entropy
from tests.backends import Backend, backends
from tests.kernels.linear_head_cases import DEEP_SIZES, SIZES, STREAMED_SIZES
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
OP = "weighted_linear_cross_entropy"
REFERENCE = pytest.param(Backend("reference", "cpu"), id="reference")
OPTIONS = [{}, {"softcap": 2.0, "z_loss": 0.1, "label_smoothing": 0.2}]


def _inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> list:
    g = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=g).to(dtype).requires_grad_()
    head = (2 * torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[3::7] = -100
    weights = torch.rand(tokens, generator=g) + 0.1
    weights[5::6] = 0
    sources = torch.randint(0, 2, (tokens,), generator=g, dtype=torch.int32) * 2  # source 1 of 3 is absent
    return [h, head, targets, weights, sources]


def _on(backend: Backend, inputs: list) -> list:
    return [x.detach().to(backend.device).requires_grad_(x.requires_grad) for x in inputs]


def _op(backend: str = "cpp", **options: float) -> Callable[..., tuple[Tensor, ...]]:
    return lambda h, head, t, w=None, s=None, total=None: tuple(
        weighted_linear_cross_entropy(
            h, head, t, w, source_ids=s, num_sources=3, normalizer=total, backend=backend, **options
        )
    )


def _reference(
    softcap: float | None = None, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> Callable[..., tuple[Tensor, ...]]:
    return lambda h, head, t, w=None, s=None, total=None: reference.weighted_linear_cross_entropy(
        h, head, t, w, s, 3, total, -100, softcap, z_loss, label_smoothing
    )


def _gradients(inputs: list, backend: str = "cpp", **options: float) -> tuple[Tensor, ...]:
    outputs = _op(backend, **options)(*inputs)
    trained = [x for x in inputs[:2] if x.requires_grad]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs[0], trained))


def _equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, *DEEP_SIZES])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference(backend: Backend, size: tuple[int, int, int], dtype: torch.dtype, options: dict) -> None:
    inputs, op = _inputs(*size, dtype), _op(backend.name, **options)
    check_op(op, _reference(**options), inputs, device=backend.device)
    # A normalizer of about one pack keeps the gradients of order one over tokens, as the default does.
    inputs = [*inputs[:3], None, None, torch.tensor(size[0] + 1.0)]
    check_op(op, _reference(**options), inputs, device=backend.device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("cuda_rows_on_the_cpu")
def test_matches_reference_with_cuda_rows(size: tuple[int, int, int], options: dict) -> None:
    for dtype in DTYPES:
        check_op(_op("triton", **options), _reference(**options), _inputs(*size, dtype))
    inputs = _inputs(*size, torch.float32)
    check_op(_op("triton", counted_rows=size[0]), _reference(), [x.requires_grad_(False) for x in inputs])


@pytest.mark.parametrize("size", [*SIZES, *DEEP_SIZES, *STREAMED_SIZES])
@pytest.mark.parametrize("options", [*OPTIONS, {"softcap": 2.0, "z_loss": 0.1}])
def test_matches_reference_over_a_frozen_head(size: tuple[int, int, int], options: dict) -> None:
    inputs = _inputs(*size, torch.bfloat16)
    inputs[1].requires_grad_(False)
    check_op(_op(**options), _reference(**options), inputs)
    with torch.no_grad():
        assert _equal(_op(**options)(*inputs)[1:], tuple(x.detach() for x in _op(**options)(*inputs))[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(300, 256, 128256), (3000, 512, 33000), (2500, 64, 50257)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", backends(OP, gpu_only=True))
def test_on_gpu_matches_reference(
    backend: Backend, size: tuple[int, int, int], dtype: torch.dtype, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the chunks of a real run
    check_op(_op(backend.name, **options), _reference(**options), _inputs(*size, dtype), device=backend.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference_with_frozen_parts(backend: Backend, dtype: torch.dtype) -> None:
    for frozen in (0, 1):
        inputs = _inputs(40, 20, 60, dtype)
        inputs[frozen].requires_grad_(False)
        check_op(_op(backend.name), _reference(), inputs, device=backend.device)


@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference_with_a_bound_for_the_rows(backend: Backend) -> None:
    inputs = _inputs(40, 20, 60, torch.bfloat16)
    count = int(((inputs[2] != -100) & (inputs[3] != 0)).sum())
    for bound in (count, count + 5, 1000):
        check_op(_op(backend.name, counted_rows=bound), _reference(), inputs, device=backend.device)
    if backend.device == "cpu":  # on a GPU the failed check would end the process
        with pytest.raises((ValueError, RuntimeError), match=r"counted_rows: .*at least"):
            _op(backend.name, counted_rows=count - 1)(*inputs)


@pytest.mark.parametrize("backend", backends(OP))
def test_many_sources(backend: Backend) -> None:
    h, head, targets, weights, _ = _inputs(50, 8, 20, torch.float32)
    sources = torch.randint(0, 40, (50,), dtype=torch.int32)

    def op(h: Tensor, head: Tensor, t: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return tuple(weighted_linear_cross_entropy(h, head, t, w, source_ids=s, num_sources=40, backend=backend.name))

    check_op(
        op,
        lambda *x: reference.weighted_linear_cross_entropy(*x, 40, None, -100, None, 0.0, 0.0),
        [h, head, targets, weights, sources],
        device=backend.device,
    )


@pytest.mark.parametrize("backend", backends(OP))
def test_non_contiguous(backend: Backend) -> None:
    h, head, targets, weights, sources = _inputs(33, 12, 50, torch.float32)
    strided = [
        h.detach().t().contiguous().t().requires_grad_(),
        head.detach().repeat_interleave(2, 0)[::2].requires_grad_(),
        targets.repeat_interleave(2)[::2],
        weights.repeat_interleave(3)[::3],
        sources.repeat_interleave(2)[::2],
    ]
    assert not any(x.is_contiguous() for x in strided)
    check_op(_op(backend.name), _reference(), strided, device=backend.device)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_equals_torch(backend: str) -> None:
    h, head, targets, _, _ = _inputs(50, 16, 40, torch.float32)
    for smoothing in (0.0, 0.3):
        loss = weighted_linear_cross_entropy(h, head, targets, label_smoothing=smoothing, backend=backend).loss
        expected = torch.nn.functional.cross_entropy(h @ head.T, targets, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)
    weighted = weighted_linear_cross_entropy(h, head, targets, torch.arange(50.0), z_loss=0.5, backend=backend).loss
    z = h @ head.T
    rows = torch.nn.functional.cross_entropy(z, targets, reduction="none") + 0.5 * z.logsumexp(-1) ** 2
    w = torch.arange(50.0) * (targets != -100)
    torch.testing.assert_close(weighted, (w * rows).sum() / w.sum())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_statistics_are_plain_per_source(backend: str) -> None:
    h, head, targets, weights, sources = _inputs(90, 16, 12, torch.float32)
    result = weighted_linear_cross_entropy(
        h, head, targets, weights, source_ids=sources, num_sources=3, z_loss=1.0, label_smoothing=0.5, backend=backend
    )
    assert isinstance(result, MixingLoss)
    z = h @ head.T
    for source in range(3):
        rows = (sources == source) & (targets != -100) & (weights > 0)
        nll = torch.nn.functional.cross_entropy(z[rows], targets[rows], reduction="none")
        torch.testing.assert_close(result.weighted_nll[source], (weights[rows] * nll).sum())
        torch.testing.assert_close(result.weight_sum[source], weights[rows].sum())
        assert result.token_count[source] == rows.sum()
        assert result.correct[source] == (z[rows].argmax(-1) == targets[rows]).sum()
    assert result.token_count[1] == 0 and result.weighted_nll[1] == 0
    assert result.loss.requires_grad and not any(x.requires_grad for x in result[1:])


@pytest.mark.parametrize("backend", backends(OP))
def test_the_first_of_equal_logits_is_the_prediction(backend: Backend) -> None:
    h, head, targets = (x.to(backend.device) for x in (torch.ones(2, 3), torch.ones(60, 3), torch.tensor([0, 1])))
    assert weighted_linear_cross_entropy(h, head, targets, backend=backend.name).correct == 1


@pytest.mark.parametrize("case", ["ignored", "zero weight", "no tokens", "normalizer 0"])
@pytest.mark.parametrize("backend", [*backends(OP), REFERENCE])
def test_nothing_counts(case: str, backend: Backend) -> None:
    h, head, targets, weights, _ = _on(backend, _inputs(0 if case == "no tokens" else 6, 4, 9, torch.float32))
    targets = torch.full_like(targets, -100) if case == "ignored" else targets
    weights = torch.zeros_like(weights) if case == "zero weight" else weights
    total = torch.zeros(1) if case == "normalizer 0" else None
    loss = weighted_linear_cross_entropy(h, head, targets, weights, normalizer=total, backend=backend.name).loss
    dhidden, dhead = torch.autograd.grad(loss, (h, head))
    assert (
        loss == 0 and dhidden.shape == h.shape and not dhidden.any() and dhead.shape == head.shape and not dhead.any()
    )


@pytest.mark.parametrize("backend", [*backends(OP), REFERENCE])
def test_rows_that_do_not_count_may_hold_anything(backend: Backend) -> None:
    h, head, targets, weights, sources = _on(backend, _inputs(12, 4, 9, torch.float32))
    h = h.detach()
    h[3], h[5], sources[3] = float("nan"), float("inf"), 99
    h.requires_grad_()
    loss = weighted_linear_cross_entropy(
        h, head, targets, weights, source_ids=sources, num_sources=3, backend=backend.name
    ).loss
    dhidden, dhead = torch.autograd.grad(loss, (h, head))
    assert loss.isfinite() and dhead.isfinite().all() and not dhidden[[3, 5]].any() and dhidden.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("trained", [False, True])
def test_nan_reaches_the_loss_and_its_own_row_only(dtype: torch.dtype, trained: bool) -> None:
    h, head, targets, *_ = _inputs(40, 16, 30, dtype)
    h = h.detach().index_fill(0, torch.tensor([4]), float("nan")).requires_grad_()
    loss = weighted_linear_cross_entropy(h, head.requires_grad_(trained), targets, normalizer=1, backend="cpp").loss
    dhidden = torch.autograd.grad(loss, h)[0]
    assert loss.isnan() and dhidden[4].isnan().all() and dhidden[torch.arange(40) != 4].isfinite().all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_normalizer_over_two_packs_equals_one_pack(backend: str) -> None:
    h, head, targets, weights, _ = _inputs(80, 16, 30, torch.float32)
    total = (weights * (targets != -100)).sum()
    parts = [
        weighted_linear_cross_entropy(
            h[rows], head, targets[rows], weights[rows], normalizer=total, backend=backend
        ).loss
        for rows in (slice(0, 50), slice(50, 80))
    ]
    whole = weighted_linear_cross_entropy(h, head, targets, weights, backend=backend).loss
    torch.testing.assert_close(sum(parts), whole)
    for a, b in zip(torch.autograd.grad(sum(parts), (h, head)), torch.autograd.grad(whole, (h, head)), strict=True):
        torch.testing.assert_close(a, b)


def test_tied_head_adds_to_the_embedding() -> None:
    embedding = torch.randn(30, 8, requires_grad=True)
    ids, targets = torch.randint(0, 30, (2, 20))

    def gradient(backend: str) -> Tensor:
        loss = weighted_linear_cross_entropy(embedding[ids].tanh(), embedding, targets, backend=backend).loss
        return torch.autograd.grad(loss, embedding)[0]

    torch.testing.assert_close(gradient("cpp"), gradient("reference"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_repeatable_bitwise_for_any_number_of_threads(dtype: torch.dtype, frozen: bool) -> None:
    inputs = _inputs(1100, 72, 1000, dtype)
    inputs[1].requires_grad_(not frozen)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _gradients(inputs)
        torch.set_num_threads(2)
        assert _equal(_gradients(inputs), one) and _equal(_gradients(inputs), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", backends(OP))
def test_repeatable_bitwise(backend: Backend) -> None:
    inputs = _on(backend, _inputs(30, 72, 300, torch.bfloat16))
    assert _equal(_gradients(inputs, backend.name), _gradients(inputs, backend.name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(OP))
def test_upstream_gradient_checkpointing_and_no_grad(backend: Backend, dtype: torch.dtype) -> None:
    inputs, op = _on(backend, _inputs(20, 8, 30, dtype)), _op(backend.name)
    plain = op(*inputs)[0]
    expected = torch.autograd.grad(3 * plain, inputs[:2], retain_graph=True)
    assert _equal(torch.autograd.grad(3 * plain, inputs[:2]), expected)
    again = checkpoint(lambda *x: op(*x)[0], *inputs, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(3 * again, inputs[:2]), expected)
    with torch.no_grad():
        assert op(*inputs)[0] == plain.detach()
    with pytest.raises(RuntimeError, match="create_graph=True, expected a first derivative only"):
        torch.autograd.grad(op(*inputs)[0], inputs[0], create_graph=True)


def test_gradcheck_reference() -> None:
    h, head, *rest = _inputs(5, 4, 6, torch.float32)
    h, head = h.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    for options in OPTIONS:
        torch.autograd.gradcheck(lambda h, w, options=options: _reference(**options)(h, w, *rest)[0], (h, head))


@pytest.mark.parametrize("tokens", [6, 0])
@pytest.mark.parametrize("backend", backends(OP))
def test_opcheck(backend: Backend, tokens: int) -> None:
    h, head, targets, weights, sources, total = _on(
        backend, [*_inputs(tokens, 4, 9, torch.bfloat16), torch.tensor(2.0)]
    )
    ops = torch.ops.forge_triton if backend.name == "triton" else torch.ops.forge
    op, options = ops.weighted_linear_cross_entropy.default, (-100, None, 2.0, 0.1, 0.1)
    torch.library.opcheck(op, (h, head, targets, weights, sources, 3, total, *options, True, True))
    torch.library.opcheck(op, (h, head.detach(), targets, None, None, 1, None, *options, True, False))


@pytest.mark.parametrize("backend", backends(OP))
def test_compiles_without_graph_break(backend: Backend) -> None:
    inputs, op = _on(backend, _inputs(20, 8, 30, torch.bfloat16)), _op(backend.name, softcap=2.0, counted_rows=20)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs), op(*inputs)
    assert _equal(actual, expected)
    assert _equal(torch.autograd.grad(actual[0], inputs[:2]), torch.autograd.grad(expected[0], inputs[:2]))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_values_out_of_range_name_the_row(backend: str) -> None:
    h, head, targets, weights, sources = (x.detach() for x in _inputs(6, 4, 9, torch.float32))

    def call(t: Tensor = targets, w: Tensor = weights, s: Tensor = sources, n: Tensor | None = None) -> None:
        weighted_linear_cross_entropy(h, head, t, w, source_ids=s, num_sources=3, normalizer=n, backend=backend)

    for bad in (9, -1):
        with pytest.raises(ValueError, match=rf"targets: got {bad} in row 2, expected 0 <= target < 9"):
            call(t=targets.index_fill(0, torch.tensor(2), bad))
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"token_weights: got .* in row 1, expected a finite weight >= 0"):
            call(w=weights.index_fill(0, torch.tensor(1), value))
    with pytest.raises(ValueError, match=r"source_ids: got 3 in row 0, expected 0 <= id < 3"):
        call(s=sources.index_fill(0, torch.tensor(0), 3))
    with pytest.raises(ValueError, match=r"normalizer: got -1.*, expected a finite number >= 0"):
        call(n=torch.tensor([-1.0]))


def test_errors_name_the_argument() -> None:
    h, head, t = torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2, dtype=torch.int64)
    for message, args, options in [
        (r"hidden: got torch\.float32 \[2, 1, 4\]", (h[:, None], head, t), {}),
        (r"lm_head: got shape \[5, 3\], expected \[vocab, 4\]", (h, head[:, :3], t), {}),
        (r"lm_head: got torch\.bfloat16, expected the dtype of hidden", (h, head.bfloat16(), t), {}),
        (r"targets: got torch\.int32 \[2\], expected int64 \[2\]", (h, head, t.int()), {}),
        (r"token_weights: got torch\.float32 \[1\], expected float32 \[2\]", (h, head, t, torch.ones(1)), {}),
        ("token_weights: got a tensor that requires grad", (h, head, t, torch.ones(2, requires_grad=True)), {}),
        (r"source_ids: got torch\.int64 \[2\], expected int32 \[2\]", (h, head, t), {"source_ids": t}),
        ("num_sources: got 0", (h, head, t), {"num_sources": 0}),
        ("normalizer: got -1", (h, head, t), {"normalizer": -1}),
        (r"normalizer: got a tensor of shape \[2\]", (h, head, t), {"normalizer": torch.ones(2)}),
        ("softcap: got 0", (h, head, t), {"softcap": 0}),
        ("z_loss: got -1", (h, head, t), {"z_loss": -1}),
        ("label_smoothing: got 2", (h, head, t), {"label_smoothing": 2}),
        ("backend 'cpp' cannot take", (h.double(), head.double(), t), {"backend": "cpp"}),
    ]:
        with pytest.raises(ValueError, match=message):
            weighted_linear_cross_entropy(*args, **options)
