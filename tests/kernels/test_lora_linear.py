from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import library, lora_linear, reference
from tests.backends import Backend, backends
from tests.tolerance import check_op

# dtype of x and the weights, dtype of the adapters
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
# tokens, in, out of each projection, rank of each: one row, odd sizes, a group of unlike projections, more than one
# panel and one block of tokens with a rank beyond a tile, nothing.
SIZES = [
    (1, 24, (17,), (3,)),
    (33, 50, (20,), (5,)),
    (70, 130, (64, 33, 17), (8, 3, 16)),
    (300, 65, (40, 129), (4, 40)),
    (0, 8, (4, 6), (2, 1)),
]
# Besides, on a CPU: depths of more than one block (2048) with few and with many tokens.
DEEP_SIZES = [(40, 4130, (2070,), (6,)), (100, 31, (2070, 20), (5, 2))]
# Besides, on a GPU: several tiles of the large matmul and their edges, ranks of one and two steps of it, and four
# projections, which no launch takes at once.
LARGE_SIZES = [
    (1000, 512, (768, 256, 256), (16, 16, 16)),
    (600, 1032, (1000,), (64,)),
    (513, 256, (520, 264), (128, 32)),
    (300, 384, (256, 128, 64, 40), (8, 8, 8, 200)),
]
# The interpreter takes its time: half of the combinations reach every line of the kernels.
BIAS_AND_DROPOUT = [(False, 0.0), (True, 0.3)] + ([] if library.TRITON_INTERPRETED else [(True, 0.0), (False, 0.3)])
SEED = torch.tensor(-123456789012345)


def _inputs(size: tuple, dtypes: tuple[torch.dtype, torch.dtype], bias: bool = False) -> list:
    tokens, features, outs, ranks = size
    torch.manual_seed(0)
    dtype, adapter = dtypes
    x = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(out, features) / features**0.5).to(dtype) for out in outs]
    a = [(torch.randn(r, features) / features**0.5).to(adapter).requires_grad_() for r in ranks]
    b = [(torch.randn(out, r) / r**0.5).to(adapter).requires_grad_() for out, r in zip(outs, ranks, strict=True)]
    biases = [torch.randn(out).to(dtype).requires_grad_() for out in outs] if bias else None
    return [x, weights, a, b, biases]


def _on(backend: Backend, inputs: list) -> list:
    """The inputs on the backend's device, as new leaves."""

    def moved(t: Tensor) -> Tensor:
        return t.detach().to(backend.device).requires_grad_(t.requires_grad)

    return [[moved(t) for t in i] if isinstance(i, list) else i if i is None else moved(i) for i in inputs]


def _scalings(weights: list) -> list[float]:
    return [0.7 + 0.1 * i for i in range(len(weights))]


def _ours(x, weights, a, b, biases=None, p=0.0, backend="cpp"):  # type: ignore[no-untyped-def]
    seed = SEED.to(x.device) if p else None
    return lora_linear(
        x, weights, a, b, scaling=_scalings(weights), bias=biases, dropout_p=p, dropout_seed=seed, backend=backend
    )


def _reference(x, weights, a, b, biases=None, p=0.0):  # type: ignore[no-untyped-def]
    biases = biases or [None] * len(weights)
    return reference.lora_linear(x, weights, a, b, biases, _scalings(weights), p, SEED if p else None)


def _gradients(function: Any, inputs: list) -> list[Tensor]:
    outputs = function(*inputs)
    leaves = [inputs[0], *inputs[2], *inputs[3]]
    return [*outputs, *torch.autograd.grad(sum(y.float().square().sum() for y in outputs), leaves)]


class _Calls(TorchDispatchMode):
    """Counts the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.arguments: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        self.arguments[func.name()] = args
        return func(*args, **(kwargs or {}))

    def count(self, op: str) -> int:
        """Calls of the op in either namespace."""
        return self.names.count(f"forge::{op}") + self.names.count(f"forge_triton::{op}")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("bias", "p"), BIAS_AND_DROPOUT)
@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_matches_reference(backend: Backend, size: tuple, dtypes: tuple, bias: bool, p: float) -> None:
    check_op(
        lambda x, w, a, b, c=None: _ours(x, w, a, b, c, p=p, backend=backend.name),
        lambda x, w, a, b, c=None: _reference(x, w, a, b, c, p=p),
        _inputs(size, dtypes, bias),
        device=backend.device,
    )


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", DEEP_SIZES)
@pytest.mark.parametrize(("bias", "p"), [(True, 0.0), (True, 0.3)])
def test_deep_matches_reference(size: tuple, dtypes: tuple, bias: bool, p: float) -> None:
    check_op(
        lambda x, w, a, b, c=None: _ours(x, w, a, b, c, p=p, backend="cpp"),
        lambda x, w, a, b, c=None: _reference(x, w, a, b, c, p=p),
        _inputs(size, dtypes, bias),
    )


@pytest.mark.parametrize("dtypes", [*DTYPES, (torch.float16, torch.float32)])
@pytest.mark.parametrize("size", LARGE_SIZES)
@pytest.mark.parametrize(("bias", "p"), [(False, 0.0), (True, 0.1)])
@pytest.mark.parametrize("backend", backends("lora_linear", gpu_only=True))
def test_on_gpu_matches_reference(backend: Backend, size: tuple, dtypes: tuple, bias: bool, p: float) -> None:
    check_op(
        lambda x, w, a, b, c=None: _ours(x, w, a, b, c, p=p, backend=backend.name),
        lambda x, w, a, b, c=None: _reference(x, w, a, b, c, p=p),
        _inputs(size, dtypes, bias),
        device=backend.device,
    )


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_non_contiguous(backend: Backend, dtypes: tuple) -> None:
    dtype, adapter = dtypes
    x = torch.randn(40, 30, dtype=dtype).t().requires_grad_()
    weight = (torch.randn(40, 25, dtype=dtype) / 6).t()
    a = (torch.randn(40, 4, dtype=adapter) / 6).t().requires_grad_()
    b = (torch.randn(25, 8, dtype=adapter) / 2)[:, ::2].requires_grad_()
    check_op(partial(_ours, backend=backend.name), _reference, [x, [weight], [a], [b]], device=backend.device)


def test_single_form_and_leading_dimensions() -> None:
    x, [weight], [a], [b], [bias] = _inputs((24, 16, (10,), (4,)), DTYPES[0], bias=True)
    y = lora_linear(x.reshape(2, 3, 4, 16), weight, a, b, scaling=0.7, bias=bias)
    torch.testing.assert_close(y, (x @ weight.T + 0.7 * (x @ a.T) @ b.T + bias).reshape(2, 3, 4, 10))


def test_group_equals_its_members() -> None:
    x, weights, a, b, _ = _inputs((50, 32, (16, 8), (4, 4)), DTYPES[0])
    grouped = lora_linear(x, weights, a, b, scaling=2.0)
    alone = [lora_linear(x, *member, scaling=2.0) for member in zip(weights, a, b, strict=True)]
    torch.testing.assert_close(list(grouped), alone)
    torch.testing.assert_close(
        torch.autograd.grad(sum(y.sin().sum() for y in grouped), x),
        torch.autograd.grad(sum(y.sin().sum() for y in alone), x),
    )


def test_missing_bias_of_a_group_is_zero() -> None:
    x, weights, a, b, biases = _inputs((5, 12, (6, 4), (2, 2)), DTYPES[0], bias=True)
    mixed = lora_linear(x, weights, a, b, scaling=1.0, bias=[biases[0], None])
    expected = reference.lora_linear(x, weights, a, b, [biases[0], None], [1.0, 1.0], 0.0, None)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(torch.autograd.grad(mixed[0].sum(), biases[0])[0], torch.full((6,), 5.0))


@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_float32_masters_get_unrounded_gradients(backend: Backend) -> None:
    inputs = _on(backend, _inputs((64, 96, (64,), (8,)), DTYPES[2]))
    for gradient in _gradients(partial(_ours, backend=backend.name), inputs)[2:]:
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())


@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_only_what_needs_a_gradient_gets_one(backend: Backend) -> None:
    ours = partial(_ours, backend=backend.name)
    x, weights, a, b, _ = _on(backend, _inputs((9, 16, (8, 6), (4, 2)), DTYPES[0]))
    with _Calls() as calls:
        ours(x.detach(), weights, a, b)[0].sum().backward()  # the other output is not used at all
    assert x.grad is None and a[0].grad is not None and b[0].grad is not None
    assert not a[1].grad.any() and not b[1].grad.any()
    assert calls.count("lora_matmul_backward") == 1
    frozen_a, frozen_b = [t.detach() for t in a], [t.detach() for t in b]
    torch.testing.assert_close(
        torch.autograd.grad(ours(x, weights, frozen_a, frozen_b)[1].sum(), x),
        torch.autograd.grad(_reference(x, weights, a, b)[1].sum(), x),
    )
    with torch.no_grad():
        assert not ours(x, weights, a, b)[0].requires_grad


def test_dropout_bits_are_philox() -> None:
    # Known answer of Philox4x32-10 for key 0 and counter 0 (Salmon et al., kat_vectors): 6627e8d5 e169c58d bc57ac4c
    # 9b00dbd8. A word is kept when it is at least round(p * 2^32).
    words = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    for position, word in enumerate(words):
        for threshold, kept in ((word, True), (word + 1, False)):
            factors = reference.dropout_factors((4,), threshold / 2**32, torch.tensor(0), 0, torch.float64)
            assert bool(factors[position]) == kept


@pytest.mark.parametrize("backend", backends("lora_linear"))
@pytest.mark.parametrize("features", [31, 36])
def test_dropout_masks_are_those_of_the_seed(backend: Backend, features: int) -> None:
    # With x = 1, A = identity and B = identity the adapter's output is the mask itself.
    tokens = 37
    x, eye, zero = (t.to(backend.device) for t in (torch.ones(tokens, features), torch.eye(features), torch.zeros(1)))
    zero = zero.expand(features, features)

    def masks(seed: Tensor | int, p: float) -> tuple[Tensor, ...]:
        outputs = lora_linear(
            x, [zero] * 2, [eye] * 2, [eye] * 2, scaling=1.0, dropout_p=p, dropout_seed=seed, backend=backend.name
        )
        return tuple(y.cpu() for y in outputs)

    for p in (0.1, 0.5, 1 - 2**-40):
        for i, mask in enumerate(masks(SEED, p)):
            expected = reference.dropout_factors((tokens, features), p, SEED, i, torch.float32)
            torch.testing.assert_close(mask, expected)
    first, second = masks(5, 0.5)
    assert not torch.equal(first, second) and not torch.equal(first, masks(6, 0.5)[0])
    assert torch.equal(first, masks(torch.tensor(5), 0.5)[0])
    assert abs((first > 0).float().mean().item() - 0.5) < 4 * 0.5 / (tokens * features) ** 0.5


def test_repeatable_and_independent_of_threads() -> None:
    inputs = _inputs((400, 200, (96, 70), (8, 8)), DTYPES[2])[:4]
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            runs.append(_gradients(partial(_ours, p=0.2), inputs))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_reference(p: float) -> None:
    x, weights, a, b, _ = _inputs((4, 5, (3, 2), (2, 1)), (torch.float64, torch.float64))
    torch.autograd.gradcheck(lambda x, a0, a1, b0, b1: _reference(x, weights, [a0, a1], [b0, b1], p=p), (x, *a, *b))


@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_repeatable_bitwise(backend: Backend) -> None:
    inputs = _on(backend, _inputs((40, 72, (40, 24), (8, 8)), DTYPES[2])[:4])
    runs = [_gradients(partial(_ours, p=0.2, backend=backend.name), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("tokens", [6, 0])
@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_opcheck(backend: Backend, tokens: int, seed: Tensor | None) -> None:
    x, weights, a, b, biases = _on(backend, _inputs((tokens, 8, (6, 4), (2, 3)), DTYPES[0], bias=True))
    ops = torch.ops.forge_triton if backend.name == "triton" else torch.ops.forge
    dropout = (0.2, seed.to(backend.device)) if seed is not None else (0.0, None)
    s = torch.randn(tokens, 5, device=backend.device, requires_grad=True)
    dys = [torch.randn(tokens, n, device=backend.device) for n in (6, 4)]
    detached = [[t.detach() for t in group] for group in (a, b)]
    bits = list(ops.lora_shrink(x, a, [1.0, 0.5], *dropout)[1:]) if backend.name == "triton" else []
    scaling = [1.0, 0.5]
    torch.library.opcheck(ops.lora_shrink.default, (x, a, scaling, *dropout))
    given = (s.detach(), x.detach(), [2, 3], [False] * 2, *dropout, *bits)
    torch.library.opcheck(ops.lora_shrink_backward.default, given)
    torch.library.opcheck(ops.lora_matmul.default, (x, s, weights, a, b, biases, scaling, *dropout, *bits))
    given = (dys, s.detach(), weights, *detached, scaling, *dropout, True, True)
    torch.library.opcheck(ops.lora_matmul_backward.default, (*given, *bits))


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_compiles_without_graph_break(backend: Backend, p: float) -> None:
    inputs = _on(backend, _inputs((12, 16, (8, 6), (4, 2)), DTYPES[2])[:4])
    ours = partial(_ours, p=p, backend=backend.name)
    compiled = torch.compile(lambda *args: ours(*args), fullgraph=True, backend="aot_eager")
    expected, actual = (_gradients(function, inputs) for function in (ours, compiled))
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_checkpointing_does_not_repeat_the_last_matmul(backend: Backend, p: float) -> None:
    inputs = _on(backend, _inputs((12, 16, (8, 6), (4, 2)), DTYPES[0])[:4])

    def block(x, weights, a, b):  # type: ignore[no-untyped-def]
        return _ours(x.sin(), weights, a, b, p=p, backend=backend.name)

    last = "forge_triton::lora_matmul_backward"
    with _Calls() as calls:
        expected = _gradients(block, inputs)
    assert last not in calls.arguments or calls.arguments[last][-1].numel() == (24 if p else 0)  # dropout bits
    with _Calls() as calls:
        actual = _gradients(lambda *args: checkpoint(block, *args, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert calls.count("lora_shrink") == 2
    assert calls.count("lora_matmul") == 1
    assert last not in calls.arguments or calls.arguments[last][-1] is None  # not kept for the time of a checkpoint


def test_errors_name_the_argument() -> None:
    x, [weight], [a], [b], _ = _inputs((4, 8, (6,), (2,)), DTYPES[0])
    for match, change in (
        (r"weight: got shape \[6, 8\] with x of \[4, 7\], expected \[out, in\]", {"x": x[:, :7]}),
        (r"weight: requires a gradient.*freeze it", {"weight": weight.clone().requires_grad_()}),
        (r"weight: got torch\.bfloat16, expected the dtype of x", {"weight": weight.bfloat16()}),
        (r"lora_a: got shape \[2, 7\], expected \[rank, 8\]", {"lora_a": a[:, :7]}),
        (r"lora_a: got torch\.bfloat16, expected torch\.float32 as x", {"lora_a": a.bfloat16()}),
        (r"lora_b: got shape \[5, 2\], expected \[6, 2\]", {"lora_b": b[:5]}),
        (r"bias: got shape \[5\], expected \[6\]", {"bias": torch.ones(5)}),
        (r"dropout_p: got 1\.0, expected a probability in \[0, 1\)", {"dropout_p": 1.0}),
        (r"dropout_seed: got None, expected", {"dropout_p": 0.1}),
        (r"dropout_seed: got torch\.float32", {"dropout_p": 0.1, "dropout_seed": torch.tensor(1.0)}),
        (r"scaling: got 2 entries, expected one per weight, 1", {"scaling": [1.0, 2.0]}),
        (r"weight: got an empty list", {"weight": [], "lora_a": [], "lora_b": []}),
        (r"lora_b\[1\]: got shape", {"weight": [weight] * 2, "lora_a": [a] * 2, "lora_b": [b, b[:5]]}),
    ):
        arguments = {"x": x, "weight": weight, "lora_a": a, "lora_b": b, "scaling": 1.0} | change
        with pytest.raises(ValueError, match=match):
            lora_linear(**arguments)
    with pytest.raises(ValueError, match=r"backend 'cpp' cannot take .*float64"):
        lora_linear(x.double(), weight.double(), a.double(), b.double(), scaling=1.0, backend="cpp")
    with torch.no_grad():
        lora_linear(x, weight.clone().requires_grad_(), a, b, scaling=1.0)
