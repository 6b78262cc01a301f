from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_core.kernels import AdamWTensors, adamw_, gradient_norm, reference
from forge_core.kernels.adamw import OP
from forge_core.kernels.registry import no_reasons
from tests.backends import Backend, backends
from tests.tolerance import check_op

# Blocks on the CPU hold 4096 values, chunks of the CUDA kernel 8192, its packs 4, its table 448 tensors.
CASES = {
    "one value": [(1,)],
    "around blocks": [(4095,), (4097,), (8191,), (8192,), (8196,), (20001,)],
    "empty between": [(0,), (7, 3), (0, 5), (2, 3, 4), ()],
    "more than a table": [(3,)] * 450,
}
BY_BLOCKS = pytest.param(Backend("by_blocks", "cpu"), id="by_blocks")  # the CUDA kernel's work, on the CPU
BACKENDS = [*backends("adamw_"), BY_BLOCKS]
LOW = [torch.bfloat16, torch.float16]
OPTIONS: dict[str, Any] = {"learning_rate": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}


@pytest.fixture(autouse=True)
def _by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OP, "backends", OP.backends.copy())
    OP.register("by_blocks", torch.ops.forge.adamw_by_blocks_, no_reasons)


def _inputs(shapes: list[tuple[int, ...]], gradient_dtype: torch.dtype) -> list[list[Tensor]]:
    """Parameters, gradients, first and second moments."""
    torch.manual_seed(0)
    p, g, m, v = ([torch.randn(shape) for shape in shapes] for _ in range(4))
    return [p, [x.to(gradient_dtype) for x in g], [0.1 * x for x in m], [0.1 * x.square() for x in v]]


def _three_steps(backend: str, low: torch.dtype | None) -> Callable[..., tuple[Tensor, ...]]:
    """Every other tensor has a rounded copy; learning rates, weight decays and clipping differ from their defaults."""

    def run(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor]) -> tuple[Tensor, ...]:
        rounded: list[Tensor | None] = [None] * len(p)
        if low is not None:
            kept = low if p[0].dtype == torch.float32 else torch.float64
            rounded = [torch.zeros_like(x, dtype=kept) if i % 2 == 0 else None for i, x in enumerate(p)]
        tensors = AdamWTensors(
            p, m, v, rounded=rounded, lr_scales=[1.0 + i % 3 for i in range(len(p))],
            weight_decays=[0.1 * (i % 2) for i in range(len(p))],
        )  # fmt: skip
        tensors.steps += torch.arange(len(p), device=p[0].device) % 5
        norm = reference.gradient_norm(g).float()
        for step in range(3):
            options = OPTIONS | {"max_norm": float(norm) * (0.5 + step)}  # clips in the first step alone
            adamw_(tensors, g, norm=norm, backend=backend, **options)
        return *p, *m, *v, tensors.steps.double(), *(x for x in rounded if x is not None)

    return run


@pytest.mark.parametrize(
    ("case", "dtype", "low"),
    [("around blocks", dtype, low) for dtype in (torch.float32, *LOW) for low in (None, *LOW)]
    + [(case, torch.bfloat16, torch.bfloat16) for case in CASES if case != "around blocks"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend: Backend, case: str, low: torch.dtype | None, dtype: torch.dtype) -> None:
    inputs = _inputs(CASES[case], dtype)
    check_op(_three_steps(backend.name, low), _three_steps("reference", low), inputs, device=backend.device)


@pytest.mark.parametrize("backend", BACKENDS)
def test_addresses_that_fit_no_vector(backend: Backend) -> None:
    results = []
    for shift in (0, 1):
        p, g, m, v = ([x.to(backend.device) for x in xs] for xs in _inputs([(9001,)] * 5, torch.bfloat16))
        lists = [p, g, m, v, [x.half() for x in p]]
        for i, tensors in enumerate(lists):  # one address of each tensor
            tensors[i] = torch.cat([tensors[i][:shift], tensors[i]])[shift:]
        p, g, m, v, rounded = lists
        adamw_(AdamWTensors(p, m, v, rounded=rounded), g, backend=backend.name, **OPTIONS)
        results.append([*p, *m, *v, *rounded])
    for shifted, whole in zip(*results, strict=True):
        torch.testing.assert_close(shifted, whole)


@pytest.mark.parametrize("backend", backends("adamw_", gpu_only=True))
def test_on_gpu_large(backend: Backend) -> None:
    inputs = _inputs([(64, 14336)] * 40 + [(4096,)] * 500, torch.bfloat16)
    check_op(_three_steps("cuda", torch.bfloat16), _three_steps("reference", torch.bfloat16), inputs, device="cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_gradients_leave_their_tensors_alone(backend: Backend) -> None:
    p, g, m, v = ([x.to(backend.device) for x in xs] for xs in _inputs([(5,), (4097,), (3, 3)], torch.float32))
    before = [[x.clone() for x in xs] for xs in (p, m, v)]
    tensors = AdamWTensors(p, m, v)
    adamw_(tensors, [g[0], None, g[2]], backend=backend.name, **OPTIONS)
    assert tensors.steps.tolist() == [1, 0, 1]
    for xs, olds in zip((p, m, v), before, strict=True):
        assert [torch.equal(x, old) for x, old in zip(xs, olds, strict=True)] == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_stay_and_a_rate_may_be_a_tensor(backend: Backend) -> None:
    inputs = [[x.to(backend.device) for x in xs] for xs in _inputs([(100,), (7,)], torch.float32)]
    results = []
    for rate in (0.25, torch.tensor(0.25, device=backend.device)):
        p, g, m, v = ([x.clone() for x in xs] for xs in inputs)
        options = OPTIONS | {"learning_rate": rate}
        adamw_(AdamWTensors(p, m, v), g, norm=gradient_norm(g), max_norm=0.1, backend=backend.name, **options)
        assert all(torch.equal(x, old) for x, old in zip(g, inputs[1], strict=True))
        results.append([*p, *m, *v])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert not torch.equal(results[0][0], inputs[0][0])


def test_repeatable_and_independent_of_threads() -> None:
    shapes = CASES["around blocks"] * 10
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            runs.append(_three_steps("cpp", torch.bfloat16)(*_inputs(shapes, torch.float32)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for run in runs[1:] for x, y in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", LOW)
def test_matches_reference_in_every_number_of_16_bits(backend: Backend, low: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(low)
    wide = every.float()
    # The numbers, what lies between them and their neighbours, and what is a little off the middle.
    between = torch.cat([wide, (wide + wide.roll(1)) / 2, wide * (1 + 2**-12), wide * (1 - 2**-12)])
    p, rounded = between.to(backend.device), torch.zeros(4 * 2**16, dtype=low, device=backend.device)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    gradient = every.repeat(4).to(backend.device)
    options = OPTIONS | {"learning_rate": 0.0, "betas": (0.0, 0.0)}
    adamw_(AdamWTensors([p], [m], [v], rounded=[rounded]), [gradient], backend=backend.name, **options)
    number = gradient.isfinite()  # a gradient that is not finite makes its parameter NaN
    assert torch.equal(m[number], gradient[number].float()) and not m[~number].isfinite().any()
    ours, theirs = rounded[number].cpu(), between[number.cpu()].to(low)
    assert torch.equal(ours.nan_to_num(nan=-1.0, posinf=None), theirs.nan_to_num(nan=-1.0, posinf=None))
    assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_steps_captured_in_a_cuda_graph() -> None:
    results = []
    for captured in (False, True):
        p, g, m, v = ([x.cuda() for x in xs] for xs in _inputs([(70_000,)] + [(33,)] * 500, torch.bfloat16))
        tensors = AdamWTensors(p, m, v)
        rate = torch.tensor(0.01, device="cuda")

        def step(tensors: AdamWTensors = tensors, g: list[Tensor] = g, rate: Tensor = rate) -> None:
            adamw_(tensors, g, norm=gradient_norm(g), **OPTIONS | {"learning_rate": rate})

        play = step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            play = graph.replay
        for factor in (1.0, 0.5, 0.25):
            rate.fill_(0.01 * factor)
            play()
        results.append([*p, *m, *v, tensors.steps])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_what_cpp_does_not_take_runs_on_the_reference() -> None:
    p, g, m, v = _inputs([(6, 4), (5,)], torch.float32)
    transposed = [[x.t() for x in xs] for xs in (p, g, m, v)]
    wide = [[x.double() for x in xs] for xs in (p, g, m, v)]
    adamw_(AdamWTensors(transposed[0], transposed[2], transposed[3]), transposed[1], **OPTIONS)
    adamw_(AdamWTensors(wide[0], wide[2], wide[3]), wide[1], **OPTIONS)
    for ours, theirs in zip(transposed[0], wide[0], strict=True):
        torch.testing.assert_close(ours.t().double(), theirs, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="takes contiguous tensors"):
        adamw_(AdamWTensors(transposed[0], transposed[2], transposed[3]), transposed[1], backend="cpp", **OPTIONS)
    with pytest.raises(ValueError, match="takes float32 parameters"):
        adamw_(AdamWTensors(wide[0], wide[2], wide[3]), g, backend="cpp", **OPTIONS)


@pytest.mark.parametrize("backend", backends("adamw_"))
def test_opcheck_and_compile(backend: Backend) -> None:
    inputs = [[x.to(backend.device) for x in xs] for xs in _inputs([(5, 3), (70,)], torch.float32)]
    p, g, m, v = ([x.clone() for x in xs] for xs in inputs)
    ones = torch.ones(2, device=backend.device)
    torch.library.opcheck(
        torch.ops.forge.adamw_.default,
        (p, g, m, v, ones.clone(), [x.bfloat16() for x in p], ones, ones, 0.1, None, 0.9, 0.95, 1e-8, ones[0], 1.0),
    )

    def step(p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], steps: Tensor) -> None:
        empty: list[Tensor] = []
        torch.ops.forge.adamw_(p, g, m, v, steps, empty, ones, ones, 0.1, None, 0.9, 0.95, 1e-8, None, 1.0)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        p, g, m, v = ([x.clone() for x in xs] for xs in inputs)
        steps = ones.clone()
        function(p, g, m, v, steps)
        results.append([*p, *m, *v, steps])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_errors_name_the_argument() -> None:
    p, g, m, v = _inputs([(6, 4), (5,)], torch.float32)
    with pytest.raises(ValueError, match="exp_avg_sq: got 1, expected one per parameter, 2"):
        AdamWTensors(p, m, v[:1])
    with pytest.raises(ValueError, match=r"exp_avg: got torch.float32 \[5\] on cpu at index 0, expected .* \[6, 4\]"):
        AdamWTensors(p, m[::-1], v)
    with pytest.raises(ValueError, match=r"parameters: got torch.bfloat16 .*expected torch.float32"):
        AdamWTensors([x.bfloat16() for x in p], m, v)
    with pytest.raises(ValueError, match=r"rounded: got \[2\] on cpu at index 1, expected \[5\]"):
        AdamWTensors(p, m, v, rounded=[None, torch.zeros(2)])
    tensors = AdamWTensors(p, m, v)
    with pytest.raises(ValueError, match=r"gradients: got shape \[4, 6\] at index 0, expected \[6, 4\]"):
        adamw_(tensors, [g[0].t(), g[1]], **OPTIONS)
    with pytest.raises(ValueError, match="gradients: got 1, expected one per parameter, 2"):
        adamw_(tensors, g[:1], **OPTIONS)
    for name, value in (("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)), ("eps", -1e-8), ("max_norm", 0.0)):
        with pytest.raises(ValueError, match=f"{name}: got .*, expected"):
            adamw_(tensors, g, **OPTIONS | {name: value})
    with pytest.raises(ValueError, match="gradients: got 5 values at index 0, expected 24 as the parameter"):
        ones = torch.ones(2)
        torch.ops.forge.adamw_(p, g[::-1], m, v, ones, [], ones, ones, 0.1, None, 0.9, 0.95, 1e-8, None, 1.0)
