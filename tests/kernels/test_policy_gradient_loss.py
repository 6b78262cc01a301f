import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import PolicyLoss, linear_token_logprobs, policy_gradient_loss, reference
from tests.backends import Backend, backends
from tests.kernels.linear_head_cases import SIZES, STREAMED_SIZES
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
OP = "policy_gradient_loss"
REFERENCE = pytest.param(Backend("reference", "cpu"), id="reference")
OBJECTIVES = ["clip", "sequence_clip", "cispo", "reinforce"]
WIDE = {"clip_low": 0.6, "clip_high": 1.0}  # bounds far enough apart that log-ratios inside them are of order one
FULL = WIDE | {"kl_coef": 0.3, "entropy_coef": 0.2, "temperature": 1.3, "softcap": 3.0}


def _inputs(
    tokens: int, hidden: int, vocab: int, dtype: torch.dtype, temperature: float = 1.0, softcap: float | None = None
) -> list:
    g = torch.Generator().manual_seed(0)
    h = torch.randn(tokens, hidden, generator=g).to(dtype).requires_grad_()
    head = (2 * torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,), generator=g)
    targets[3::7] = -100
    # Both signs and zeros, but no sum of cancelling terms: its rounding errors would be luck.
    advantages = 1 + torch.rand(tokens, generator=g)
    advantages[::4] *= -0.5
    advantages[1::9] = 0
    # Ratios on both sides of both bounds, none so near to a bound that rounding decides.
    logprob = reference.linear_token_logprobs(h, head, targets, temperature, softcap, -100)[0].detach().float()
    near = 0.08 * torch.rand(tokens, generator=g)
    side = torch.tensor([-1.3, -0.4, 0.4, 1.3])[torch.randint(0, 4, (tokens,), generator=g)]
    old, ref = logprob + near + side, logprob + torch.randn(tokens, generator=g)
    weights = torch.rand(tokens, generator=g) + 0.1
    weights[5::6] = 0
    return [h, head, targets, advantages, old, ref, weights]


def _documents(tokens: int) -> Tensor:
    """Uneven sequences that cross chunks, the second empty."""
    cuts = [0, tokens // 7, tokens // 7, tokens // 2, tokens - tokens // 8, tokens]
    return torch.tensor(cuts, dtype=torch.int32)


def _on(backend: Backend, inputs: list) -> list:
    return [x.detach().to(backend.device).requires_grad_(x.requires_grad) for x in inputs]


def _op(objective: str, backend: str = "cpp", **options: float) -> Callable[..., tuple[Tensor, ...]]:
    def run(h: Tensor, head: Tensor, t: Tensor, a: Tensor, old: Tensor, ref: Tensor, w: Tensor) -> PolicyLoss:
        cu_seqlens = _documents(len(t)).to(t.device) if objective == "sequence_clip" else None
        loss = policy_gradient_loss(
            h, head, t, a, old, ref, objective=objective, token_weights=w, cu_seqlens=cu_seqlens, backend=backend,
            **options,
        )  # fmt: skip
        return loss

    return lambda *inputs: tuple(run(*inputs))


def _reference(objective: str, **options: float) -> Callable[..., tuple[Tensor, ...]]:
    o = {"clip_low": 0.2, "clip_high": 0.2, "kl_coef": 0.0, "entropy_coef": 0.0, "temperature": 1.0, "softcap": None}
    o |= options

    def run(h: Tensor, head: Tensor, t: Tensor, a: Tensor, old: Tensor, ref: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        cu_seqlens = _documents(len(t)) if objective == "sequence_clip" else None
        loss, counts, sums = reference.policy_gradient_loss(
            h, head, t, a, old, ref, w, cu_seqlens, None, objective, *o.values(), -100
        )
        return loss, *counts.unbind(), *sums.unbind()

    return run


def _gradients(inputs: list, objective: str = "clip", backend: str = "cpp", **options: float) -> tuple[Tensor, ...]:
    outputs = _op(objective, backend, **options)(*inputs)
    trained = [x for x in inputs[:2] if x.requires_grad]
    return (*(o.detach() for o in outputs), *torch.autograd.grad(outputs[0], trained))


def _equal(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference(backend: Backend, size: tuple[int, int, int], dtype: torch.dtype, objective: str) -> None:
    for options in (WIDE, FULL):
        inputs = _inputs(*size, dtype, options.get("temperature", 1.0), options.get("softcap"))
        op = _op(objective, backend.name, **options)
        check_op(op, _reference(objective, **options), inputs, device=backend.device)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.usefixtures("cuda_rows_on_the_cpu")
def test_matches_reference_with_cuda_rows(size: tuple[int, int, int], objective: str) -> None:
    for dtype, options, frozen in (
        (torch.float32, FULL, False),
        (torch.bfloat16, WIDE, False),
        (torch.bfloat16, FULL | {"entropy_coef": 0.0}, True),
    ):
        inputs = _inputs(*size, dtype, options.get("temperature", 1.0), options.get("softcap"))
        inputs[1].requires_grad_(not frozen)
        check_op(_op(objective, "triton", **options), _reference(objective, **options), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(300, 256, 128256), (2500, 64, 50257)])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", backends(OP, gpu_only=True))
def test_on_gpu_matches_reference(
    backend: Backend, size: tuple[int, int, int], dtype: torch.dtype, objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the chunks of a real run
    inputs = _inputs(*size, dtype, FULL["temperature"], FULL["softcap"])
    check_op(_op(objective, backend.name, **FULL), _reference(objective, **FULL), inputs, device=backend.device)


@pytest.mark.parametrize("objective", ["clip", "sequence_clip"])
@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference_with_a_bound_for_the_rows(backend: Backend, objective: str) -> None:
    inputs = _inputs(9, 33, 49, torch.bfloat16)
    count = int(((inputs[2] != -100) & (inputs[6] != 0)).sum())
    check_op(
        _op(objective, backend.name, counted_rows=count, **WIDE),
        _reference(objective, **WIDE),
        inputs,
        device=backend.device,
    )
    if backend.device == "cpu":  # on a GPU the failed check would end the process
        with pytest.raises((ValueError, RuntimeError), match=r"counted_rows: .*at least"):
            _op(objective, backend.name, counted_rows=count - 1)(*inputs)


@pytest.mark.parametrize("size", [*SIZES, *STREAMED_SIZES])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_matches_reference_over_a_frozen_head(size: tuple[int, int, int], objective: str) -> None:
    for options in (WIDE, FULL | {"entropy_coef": 0.0}, FULL):
        softmax = {key: options[key] for key in ("temperature", "softcap") if key in options}
        inputs = _inputs(*size, torch.bfloat16, **softmax)
        inputs[1].requires_grad_(False)
        check_op(_op(objective, **options), _reference(objective, **options), inputs)
    with torch.no_grad():
        check_op(_op(objective, **FULL), _reference(objective, **FULL), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", backends(OP))
def test_matches_reference_with_frozen_parts(backend: Backend, dtype: torch.dtype) -> None:
    for frozen in (0, 1):
        inputs = _inputs(70, 64, 515, dtype)
        inputs[frozen].requires_grad_(False)
        for objective, options in (("clip", {"entropy_coef": 0.1}), ("sequence_clip", WIDE | {"kl_coef": 0.3})):
            op, expected = _op(objective, backend.name, **options), _reference(objective, **options)
            check_op(op, expected, inputs, device=backend.device)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("objective", ["clip", "cispo", "reinforce"])
def test_equals_the_formula_on_token_logprobs(objective: str, backend: str) -> None:
    h, head, targets, advantages, old, ref, weights = _inputs(60, 16, 40, torch.float32)
    result = policy_gradient_loss(
        h, head, targets, advantages, old, ref, objective=objective, clip_low=0.1, clip_high=0.28, kl_coef=0.5,
        entropy_coef=0.25, token_weights=weights, normalizer=7.0, backend=backend,
    )  # fmt: skip
    logprob, entropy = linear_token_logprobs(h, head, targets)
    ratio = (logprob - old).exp()
    bounded = ratio.clamp(0.9, 1.28)
    policy = {
        "clip": -torch.minimum(ratio * advantages, bounded * advantages),
        "cispo": -bounded.detach() * advantages * logprob,
        "reinforce": -advantages * logprob,
    }[objective]
    kl = (ref - logprob).exp() - (ref - logprob) - 1
    counted = (targets != -100) & (weights > 0)
    expected = ((policy + 0.5 * kl - 0.25 * entropy) * weights)[counted].sum() / 7
    torch.testing.assert_close(result.loss, expected)
    actual_gradients = torch.autograd.grad(result.loss, (h, head))
    torch.testing.assert_close(actual_gradients, torch.autograd.grad(expected, (h, head)))

    assert result.loss.requires_grad and not any(x.requires_grad for x in result[1:])
    assert result.token_count == counted.sum()
    used = counted & (advantages != 0) if objective == "cispo" else counted
    low = used & (ratio < 0.9) & ((advantages < 0) | (objective == "cispo"))
    high = used & (ratio > 1.28) & ((advantages > 0) | (objective == "cispo"))
    clipped = 0 if objective == "reinforce" else 1
    assert result.clipped_low == clipped * low.sum() and result.clipped_high == clipped * high.sum()
    assert low.any() and high.any()
    torch.testing.assert_close(result.entropy_sum, entropy[counted].sum())
    torch.testing.assert_close(result.kl_sum, kl[counted].sum())
    torch.testing.assert_close(result.old_kl_sum, (ratio - 1 - ratio.log())[counted].sum())
    torch.testing.assert_close(result.ratio_sum, ratio[counted].sum())
    torch.testing.assert_close(result.max_abs_log_ratio, ratio.log().abs()[counted].max())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_sequence_ratio_is_the_papers(backend: str) -> None:
    h, head, targets, _, old, _, _ = _inputs(30, 16, 40, torch.float32)
    cu_seqlens = torch.tensor([0, 12, 30], dtype=torch.int32)
    kept, loss = targets != -100, torch.zeros(())
    advantage, weights, advantages = (2.0, -1.0), torch.zeros(30), torch.zeros(30)
    logprob = linear_token_logprobs(h, head, targets)[0]
    for s, rows in enumerate((slice(0, 12), slice(12, 30))):
        length = kept[rows].sum()
        ratio = ((logprob - old)[rows][kept[rows]].sum() / length).exp()
        loss = loss - torch.minimum(ratio * advantage[s], ratio.clamp(0.9, 1.02) * advantage[s]) / 2
        weights[rows], advantages[rows] = 1 / length, advantage[s]
    result = policy_gradient_loss(
        h, head, targets, advantages, old, objective="sequence_clip", clip_low=0.1, clip_high=0.02,
        token_weights=weights, normalizer=2.0, cu_seqlens=cu_seqlens, backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, loss)
    torch.testing.assert_close(torch.autograd.grad(result.loss, (h, head)), torch.autograd.grad(loss, (h, head)))


@pytest.mark.parametrize("backend", [*backends(OP), REFERENCE])
def test_on_policy_objectives_share_a_gradient(backend: Backend) -> None:
    h, head, targets, advantages, *_ = _on(backend, _inputs(20, 16, 30, torch.float32))
    current = linear_token_logprobs(h, head, targets)[0].detach()
    expected = None
    for objective in ("clip", "cispo", "reinforce"):
        for old in (None, current):
            result = policy_gradient_loss(h, head, targets, advantages, old, objective=objective, backend=backend.name)
            gradients = torch.autograd.grad(result.loss, (h, head))
            expected = expected or gradients
            torch.testing.assert_close(gradients, expected)
            torch.testing.assert_close(result.ratio_sum, result.token_count.float())
            assert not result.clipped_low and not result.clipped_high


@pytest.mark.parametrize("backend", [*backends(OP), REFERENCE])
def test_bounds_can_be_taken_away(backend: Backend) -> None:
    h, head, targets, advantages, old, *_ = _on(backend, _inputs(20, 16, 30, torch.float32))
    result = policy_gradient_loss(
        h, head, targets, advantages, old, clip_low=1, clip_high=math.inf, normalizer=1, backend=backend.name
    )
    ratio = (linear_token_logprobs(h, head, targets)[0] - old).exp()
    torch.testing.assert_close(result.loss, -(ratio * advantages)[targets != -100].sum())
    assert not result.clipped_low and not result.clipped_high


@pytest.mark.parametrize("case", ["ignored", "zero weight", "no tokens", "normalizer 0"])
@pytest.mark.parametrize("objective", ["clip", "sequence_clip"])
@pytest.mark.parametrize("backend", [*backends(OP), REFERENCE])
def test_nothing_counts(case: str, objective: str, backend: Backend) -> None:
    inputs = _on(backend, _inputs(0 if case == "no tokens" else 8, 4, 9, torch.float32))
    if case == "ignored":
        inputs[2] = torch.full_like(inputs[2], -100)
    if case == "zero weight":
        inputs[6] = torch.zeros_like(inputs[6])
    options = {"normalizer": torch.zeros(1)} if case == "normalizer 0" else {}
    outputs = _op(objective, backend.name, **options)(*inputs)
    gradients = torch.autograd.grad(outputs[0], inputs[:2])
    assert outputs[0] == 0 and not any(g.any() for g in gradients)
    assert case == "normalizer 0" or not any(x.any() for x in outputs[1:])


@pytest.mark.parametrize("objective", ["clip", "sequence_clip"])
@pytest.mark.parametrize("backend", [*backends(OP), REFERENCE])
def test_rows_that_do_not_count_may_hold_anything(objective: str, backend: Backend) -> None:
    inputs = _on(backend, _inputs(12, 4, 9, torch.float32))
    bad = [x.detach().clone() for x in inputs]
    for i in (0, 3, 4, 5):
        bad[i][[3, 5, 10, 11]] = float("nan")
    bad[0].requires_grad_(), bad[1].requires_grad_()
    expected, actual = (_op(objective, backend.name, kl_coef=0.1)(*x) for x in (inputs, bad))
    assert _equal(actual, expected)
    for gradients in zip(*(torch.autograd.grad(o[0], x[:2]) for o, x in ((actual, bad), (expected, inputs)))):  # noqa: B905
        assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("objective", ["clip", "sequence_clip"])
def test_repeatable_bitwise_for_any_number_of_threads(dtype: torch.dtype, objective: str, frozen: bool) -> None:
    inputs = _inputs(1100, 72, 1000, dtype)
    inputs[1].requires_grad_(not frozen)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _gradients(inputs, objective)
        torch.set_num_threads(2)
        assert _equal(_gradients(inputs, objective), one) and _equal(_gradients(inputs, objective), one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("objective", ["clip", "sequence_clip"])
@pytest.mark.parametrize("backend", backends(OP))
def test_repeatable_bitwise(backend: Backend, objective: str) -> None:
    inputs = _on(backend, _inputs(30, 72, 300, torch.bfloat16))
    assert _equal(_gradients(inputs, objective, backend.name), _gradients(inputs, objective, backend.name))


@pytest.mark.parametrize("backend", backends(OP))
def test_upstream_gradient_checkpointing_and_no_grad(backend: Backend) -> None:
    inputs, op = _on(backend, _inputs(20, 8, 30, torch.float32)), _op("clip", backend.name)
    plain = op(*inputs)[0]
    expected = torch.autograd.grad(3 * plain, inputs[:2])
    again = checkpoint(lambda *x: op(*x)[0], *inputs, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(3 * again, inputs[:2]), expected)
    with torch.no_grad():
        assert op(*inputs)[0] == plain.detach()
    with pytest.raises(RuntimeError, match="create_graph=True, expected a first derivative only"):
        torch.autograd.grad(op(*inputs)[0], inputs[0], create_graph=True)


@pytest.mark.parametrize("objective", ["clip", "sequence_clip", "reinforce"])  # cispo stops a gradient on purpose
def test_gradcheck_reference(objective: str) -> None:
    h, head, *rest = _inputs(9, 4, 6, torch.float32, FULL["temperature"], FULL["softcap"])
    h, head = h.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    torch.autograd.gradcheck(lambda h, w: _reference(objective, **FULL)(h, w, *rest)[0], (h, head))


@pytest.mark.parametrize("tokens", [6, 0])
@pytest.mark.parametrize("backend", backends(OP))
def test_opcheck(backend: Backend, tokens: int) -> None:
    h, head, t, a, old, ref, w, cu, total = _on(
        backend, [*_inputs(tokens, 4, 9, torch.bfloat16), _documents(tokens), torch.tensor(2.0)]
    )
    op = (torch.ops.forge_triton if backend.name == "triton" else torch.ops.forge).policy_gradient_loss.default
    options = (0.2, 0.3, 0.1, 0.1, 0.9, 2.0, -100, None)
    torch.library.opcheck(op, (h, head, t, a, old, ref, w, cu, total, "sequence_clip", *options, True, True))
    options = (0.2, 0.3, 0.0, *options[3:])
    torch.library.opcheck(op, (h, head.detach(), t, a, None, None, None, None, None, "clip", *options, True, False))


@pytest.mark.parametrize("backend", backends(OP))
def test_compiles_without_graph_break(backend: Backend) -> None:
    inputs = _on(backend, _inputs(20, 8, 30, torch.float32))
    for objective in ("clip", "sequence_clip"):
        op = _op(objective, backend.name, softcap=2.0, counted_rows=20)
        compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
        actual, expected = compiled(*inputs), op(*inputs)
        assert _equal(actual, expected)
        assert _equal(torch.autograd.grad(actual[0], inputs[:2]), torch.autograd.grad(expected[0], inputs[:2]))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_values_out_of_range_name_the_row(backend: str) -> None:
    inputs = [x.detach() for x in _inputs(6, 4, 9, torch.float32)]
    for i, bad, message in [
        (2, 9, "targets: got 9 in row 1, expected 0 <= target < 9"),
        (3, math.nan, "advantages: got nan in row 1, expected a finite number"),
        (4, math.inf, "old_logprobs: got inf in row 1, expected a finite number"),
        (5, -math.inf, "ref_logprobs: got -inf in row 1, expected a finite number"),
        (6, -1.0, "token_weights: got -1.* in row 1, expected a finite weight >= 0"),
    ]:
        changed = [*inputs[:i], inputs[i].index_fill(0, torch.tensor(1), bad), *inputs[i + 1 :]]
        with pytest.raises(ValueError, match=message):
            _op("clip", backend)(*changed)
    for offsets, message in [([0, 9], "cu_seqlens: .* at 6|up to 6"), ([0, 4, 2, 6], "never decreas"), ([1, 6], "0")]:
        with pytest.raises(ValueError, match=message):
            _sequence(inputs, torch.tensor(offsets, dtype=torch.int32), backend)
    with pytest.raises(ValueError, match=r"cu_seqlens: .* row 2.*, expected every row that counts inside a document"):
        _sequence(inputs, torch.tensor([0, 2], dtype=torch.int32), backend)


def _sequence(inputs: list, cu_seqlens: Tensor, backend: str) -> None:
    policy_gradient_loss(*inputs[:5], objective="sequence_clip", cu_seqlens=cu_seqlens, backend=backend)


def test_errors_name_the_argument() -> None:
    h, head, t = torch.ones(2, 4), torch.ones(5, 4), torch.zeros(2, dtype=torch.int64)
    a, cu = torch.ones(2), torch.tensor([0, 2], dtype=torch.int32)
    for message, old, options in [
        (r"old_logprobs: got torch\.float32 \[3\], expected float32 \[2\]", torch.ones(3), {}),
        (r"old_logprobs: got torch\.float64 \[2\], expected float32 \[2\]", torch.ones(2).double(), {}),
        ("old_logprobs: got a tensor that requires grad", torch.ones(2, requires_grad=True), {}),
        (r"ref_logprobs: got torch\.float32 \[1\]", a, {"ref_logprobs": torch.ones(1)}),
        ("ref_logprobs: got None with kl_coef 0.1", a, {"kl_coef": 0.1}),
        ("objective: got 'ppo', expected one of", a, {"objective": "ppo"}),
        ("clip_low: got 1.5, expected 0 <= clip_low <= 1", a, {"clip_low": 1.5}),
        ("clip_high: got -1, expected a number >= 0", a, {"clip_high": -1}),
        ("kl_coef: got -1", a, {"kl_coef": -1}),
        ("entropy_coef: got inf", a, {"entropy_coef": math.inf}),
        ("temperature: got 0, expected a finite number > 0", a, {"temperature": 0}),
        ("normalizer: got -1", a, {"normalizer": -1}),
        ("cu_seqlens: got None with objective 'sequence_clip'", a, {"objective": "sequence_clip"}),
        ("cu_seqlens: got a tensor with objective 'clip', expected None", a, {"cu_seqlens": cu}),
        (r"cu_seqlens: got torch\.int64 \[2\]", a, {"objective": "sequence_clip", "cu_seqlens": cu.long()}),
    ]:
        with pytest.raises(ValueError, match=message):
            policy_gradient_loss(h, head, t, a, old, **options)
    with pytest.raises(ValueError, match="advantages: got a tensor that requires grad"):
        policy_gradient_loss(h, head, t, a.clone().requires_grad_(), None)
