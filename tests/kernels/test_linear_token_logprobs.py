from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import linear_token_logprobs, reference
from tests.backends import Backend, backends
from tests.kernels.linear_head_cases import DEEP_SIZES, SIZES, STREAMED_SIZES
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
OP = "linear_token_logprobs"
REFERENCE = pytest.param(Backend("reference", "cpu"), id="reference")
OPTIONS = [{}, {"temperature": 0.7}, {"temperature": 1.5, "softcap": 2.0}]


def _inputs(tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=g).to(dtype).requires_grad_()
    head = (2 * torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[3::7] = -100
    return [h, head, targets]


def _on(backend: Backend, inputs: list) -> list:
    return [x.detach().to(backend.device).requires_grad_(x.requires_grad) for x in inputs]


def _op(backend: str = "cpp", **options: float) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda h, head, t: linear_token_logprobs(h, head, t, backend=backend, **options)


def _reference(temperature: float = 1.0, softcap: float | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda h, head, t: reference.linear_token_logprobs(h, head, t, temperature, softcap, -100)


def _gradients(inputs: list[Tensor], backend: str = "cpp") -> tuple[Tensor, ...]:
    logprob, entropy = _op(backend, temperature=0.9)(*inputs)
    upstream = torch.linspace(-1, 1, len(logprob)).to(logprob)
    gradients = torch.autograd.grad((logprob, entropy), inputs[:2], (upstream, upstream.flip(0)))
    return logprob.detach(), entropy.detach(), *gradients


def _equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, DEEP_SIZES[1], *STREAMED_SIZES])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference(backend: Backend, size: tuple[int, int, int], dtype: torch.dtype, options: dict) -> None:
    inputs = _inputs(*size, dtype)
    check_op(_op(backend.name, **options), _reference(**options), inputs, device=backend.device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("cuda_rows_on_the_cpu")
def test_matches_reference_with_cuda_rows(size: tuple[int, int, int], options: dict) -> None:
    for dtype in DTYPES:
        check_op(_op("triton", **options), _reference(**options), _inputs(*size, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(300, 256, 128256), (3000, 512, 33000), (2500, 64, 50257)])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", backends(OP, gpu_only=True))
def test_on_gpu_matches_reference(
    backend: Backend, size: tuple[int, int, int], dtype: torch.dtype, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the chunks of a real run
    check_op(_op(backend.name, **options), _reference(**options), _inputs(*size, dtype), device=backend.device)


@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference_with_a_bound_for_the_rows(backend: Backend) -> None:
    inputs = _inputs(40, 20, 60, torch.bfloat16)
    count = int((inputs[2] != -100).sum())
    for bound in (count, 1000):
        check_op(_op(backend.name, counted_rows=bound), _reference(), inputs, device=backend.device)
    if backend.device == "cpu":  # on a GPU the failed check would end the process
        with pytest.raises((ValueError, RuntimeError), match=r"counted_rows: .*at least"):
            _op(backend.name, counted_rows=count - 1)(*inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(OP))
def test_one_output_or_one_gradient_only(backend: Backend, dtype: torch.dtype) -> None:
    for output in (0, 1):
        for frozen in (0, 1):
            inputs = _inputs(20, 16, 40, dtype)
            inputs[frozen].requires_grad_(False)
            check_op(
                lambda *x, i=output: _op(backend.name)(*x)[i],
                lambda *x, i=output: _reference()(*x)[i],
                inputs,
                device=backend.device,
            )


@pytest.mark.parametrize("backend", backends(OP))
def test_non_contiguous(backend: Backend) -> None:
    h, head, targets = _inputs(33, 12, 50, torch.float32)
    strided = [
        h.detach().t().contiguous().t().requires_grad_(),
        head.detach().repeat_interleave(2, 0)[::2].requires_grad_(),
        targets.repeat_interleave(2)[::2],
    ]
    assert not any(x.is_contiguous() for x in strided)
    check_op(_op(backend.name), _reference(), strided, device=backend.device)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_equals_torch(backend: str) -> None:
    h, head, targets = _inputs(30, 16, 40, torch.float32)
    logprob, entropy = linear_token_logprobs(h, head, targets, temperature=0.5, softcap=4.0, backend=backend)
    distribution = torch.distributions.Categorical(logits=4 * torch.tanh(h @ head.T / 4) / 0.5)
    kept = targets != -100
    torch.testing.assert_close(logprob[kept], distribution.log_prob(targets.clamp(min=0))[kept])
    torch.testing.assert_close(entropy[kept], distribution.entropy()[kept])
    assert not logprob[~kept].any() and not entropy[~kept].any()


@pytest.mark.parametrize("backend", [*backends(OP), REFERENCE])
def test_ignored_rows_may_hold_anything(backend: Backend) -> None:
    h, head, targets = _inputs(12, 4, 9, torch.float32)
    h = h.detach().index_fill(0, torch.tensor([3, 10]), float("nan")).requires_grad_()
    h, head, targets = _on(backend, [h, head, targets])
    logprob, entropy = linear_token_logprobs(h, head, targets, backend=backend.name)
    dhidden, dhead = torch.autograd.grad((logprob.sum() + entropy.sum()), (h, head))
    assert logprob.isfinite().all() and dhead.isfinite().all() and not dhidden[[3, 10]].any()
    ignored = linear_token_logprobs(h, head, torch.full_like(targets, -100), backend=backend.name)
    dhidden, dhead = torch.autograd.grad((ignored[0].sum() + ignored[1].sum()), (h, head))
    assert not dhidden.any() and not dhead.any()


@pytest.mark.parametrize("backend", backends(OP))
def test_large_logits_stay_accurate(backend: Backend) -> None:
    inputs = [100 * x if x.is_floating_point() else x for x in _inputs(9, 16, 40, torch.float32)]
    check_op(_op(backend.name), _reference(), inputs, device=backend.device)


@pytest.mark.parametrize("backend", backends(OP))
def test_repeatable_bitwise(backend: Backend) -> None:
    inputs = _on(backend, _inputs(30, 72, 300, torch.bfloat16))
    assert _equal(_gradients(inputs, backend.name), _gradients(inputs, backend.name))


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable_bitwise_for_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs = _inputs(1100, 72, 1000, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _gradients(inputs)
        torch.set_num_threads(2)
        assert _equal(_gradients(inputs), one) and _equal(_gradients(inputs), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", backends(OP))
def test_checkpointing_and_no_grad(backend: Backend) -> None:
    inputs, op = _on(backend, _inputs(20, 8, 30, torch.float32)), _op(backend.name)
    expected = torch.autograd.grad(op(*inputs)[0].sum(), inputs[:2])
    again = checkpoint(lambda *x: op(*x)[0].sum(), *inputs, use_reentrant=False)
    assert _equal(torch.autograd.grad(again, inputs[:2]), expected)
    with torch.no_grad():
        assert not op(*inputs)[0].requires_grad
    with pytest.raises(RuntimeError, match="create_graph=True, expected a first derivative only"):
        torch.autograd.grad(op(*inputs)[0].sum(), inputs[0], create_graph=True)


def test_gradcheck_reference() -> None:
    h, head, targets = _inputs(5, 4, 6, torch.float32)
    h, head = h.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    for options in OPTIONS:
        torch.autograd.gradcheck(lambda h, w, options=options: _reference(**options)(h, w, targets), (h, head))


@pytest.mark.parametrize("tokens", [6, 0])
@pytest.mark.parametrize("backend", backends(OP))
def test_opcheck(backend: Backend, tokens: int) -> None:
    h, head, targets = _on(backend, _inputs(tokens, 4, 9, torch.float32))
    ops = torch.ops.forge_triton if backend.name == "triton" else torch.ops.forge
    options = (0.7, 2.0, -100, None)
    torch.library.opcheck(ops.linear_token_logprobs.default, (h, head, targets, *options))
    h, head = h.detach(), head.detach()
    logprob, entropy, softmax = ops.linear_token_logprobs(h, head, targets, *options)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            ops.linear_token_logprobs_backward.default,
            (logprob, entropy, h, head, targets, entropy, softmax, *options, *need),
        )


@pytest.mark.parametrize("backend", backends(OP))
def test_compiles_without_graph_break(backend: Backend) -> None:
    inputs, op = _on(backend, _inputs(20, 8, 30, torch.float32)), _op(backend.name, softcap=2.0, counted_rows=20)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    actual, expected = compiled(*inputs), op(*inputs)
    assert _equal(actual, expected)
    upstream = tuple(x.to(backend.device) for x in (torch.ones(20), torch.linspace(0, 1, 20)))
    assert _equal(
        torch.autograd.grad(actual, inputs[:2], upstream), torch.autograd.grad(expected, inputs[:2], upstream)
    )


def test_errors_name_the_argument() -> None:
    h, head, t = torch.ones(2, 4), torch.ones(5, 4), torch.tensor([0, 5])
    for backend in ("cpp", "reference"):
        with pytest.raises(ValueError, match="targets: got 5 in row 1, expected 0 <= target < 5 or ignore_index"):
            linear_token_logprobs(h, head, t, backend=backend)
    with pytest.raises(ValueError, match="temperature: got 0, expected a finite number > 0"):
        linear_token_logprobs(h, head, t, temperature=0)
    with pytest.raises(ValueError, match=r"lm_head: got shape \[5, 3\]"):
        linear_token_logprobs(h, head[:, :3], t)
    with pytest.raises(ValueError, match="softcap: got -1"):
        linear_token_logprobs(h, head, t, softcap=-1)
