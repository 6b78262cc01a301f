"""lora_linear, forward and backward: against the frozen matmuls alone (the floor) and what others do with adapters."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers import compiled
from bench.peers.lora import lorafusion_scheme, peft, unsloth_style
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import lora_linear

Group = tuple[int, tuple[int, ...]]  # width of the input, widths of the projections that share it
SCALING = 2.0

# tokens, input, outputs, rank: the layers of SmolLM2-135M, and layers of 1 B and 8 B models
SHAPES = [
    (2048, 576, (576,), 32),
    (2048, 576, (1536,), 32),
    (2048, 1536, (576,), 32),
    (2048, 576, (576, 192, 192), 32),
    (2048, 576, (1536, 1536), 32),
    (4096, 2048, (2048,), 64),
    (1024, 2048, (8192, 8192), 64),
    (1024, 4096, (4096,), 16),
]
WITH_DROPOUT = [SHAPES[0], SHAPES[1], SHAPES[7]]
HEADLINE = [SHAPES[0], SHAPES[3], SHAPES[4], SHAPES[7]]
LLAMA_8B: list[Group] = [(4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (14336, 14336)), (14336, (4096,))]


Run = Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, ...]]


def methods(dropout_p: float, *, compile: bool = False) -> dict[str, tuple[Run, torch.dtype | None]]:
    """name -> `run(x, weights, a, b)` of projections that share x, and the dtype of its adapters, None where frozen."""

    def forge(x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor]) -> tuple[Tensor, ...]:
        options = {"scaling": SCALING, "dropout_p": dropout_p, "dropout_seed": 1 if dropout_p else None}
        if len(weights) == 1:
            return (lora_linear(x, weights[0], a[0], b[0], **options),)
        return lora_linear(x, weights, a, b, **options)

    def each(function: Callable[..., Tensor]) -> Run:
        """One call per projection; autograd adds up the gradients of x."""
        return lambda x, weights, a, b: tuple(
            function(x, w, ai, bi, SCALING, dropout_p) for w, ai, bi in zip(weights, a, b, strict=True)
        )

    def frozen(x: Tensor, weights: list[Tensor], *_: object) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, weight) for weight in weights)

    half, single = torch.bfloat16, torch.float32
    found: dict[str, tuple[Run, torch.dtype | None]] = {
        "forge": (forge, single),
        "floor: frozen matmuls": (frozen, None),
        "PEFT bf16": (each(peft), half),
        "PEFT default": (each(peft), single),
        "Unsloth-style": (each(unsloth_style), single),
        "LoRAFusion's scheme": (each(lorafusion_scheme), single),
    }
    return found | ({"PEFT bf16 compiled": (each(compiled(peft)), half)} if compile else {})


def projections(k: int, widths: tuple[int, ...], rank: int, device: str) -> tuple[list[Tensor], ...]:
    """Weights and float32 adapters a, b of projections that share an input of width k."""
    weights = [(torch.randn(n, k, device=device) / k**0.5).bfloat16() for n in widths]
    a = [torch.randn(rank, k, device=device) / k**0.5 for _ in widths]
    return weights, a, [torch.randn(n, rank, device=device) / rank**0.5 for n in widths]


def adapters_as(dtype: torch.dtype | None, *sides: list[Tensor]) -> list[list[Tensor]]:
    """Copies of adapters to be trained, in a dtype of their own; None leaves them out of training."""
    return [[t.detach().to(dtype or t.dtype).requires_grad_(dtype is not None) for t in side] for side in sides]


def layers(tokens: int, groups: list[Group], rank: int, dropout_p: float, device: str, *, compile: bool) -> Candidates:
    """Candidates that run every group forward and backward, one after another."""
    inputs = []
    for k, widths in groups:
        x = torch.randn(tokens, k, dtype=torch.bfloat16, device=device, requires_grad=True)
        dy = [torch.randn(tokens, n, dtype=torch.bfloat16, device=device) for n in widths]
        inputs.append((x, *projections(k, widths, rank, device), dy))

    def candidate(run: Run, dtype: torch.dtype | None) -> Thunk:
        prepared = [(x, weights, *adapters_as(dtype, a, b), dy) for x, weights, a, b, dy in inputs]

        def call() -> None:
            for x, weights, a, b, dy in prepared:
                torch.autograd.grad(run(x, weights, a, b), [x, *a, *b] if dtype else [x], dy)

        return call

    return {name: candidate(*method) for name, method in methods(dropout_p, compile=compile).items()}


def work(tokens: int, groups: list[Group], rank: int) -> dict[str, float]:
    """FLOPs (forward, dX, and six skinny products of the adapter) and compulsory bytes."""
    flops = bytes = 0.0
    for k, widths in groups:
        n = sum(widths)
        flops += 4.0 * tokens * k * n + 6.0 * tokens * rank * (k * len(widths) + n)
        bytes += 2.0 * (2 * k * n + 3 * tokens * k + 2 * tokens * n)
    return {"flops": flops, "bytes": bytes}


def _aims(dropout_p: float, device: str) -> dict[str, float]:
    if device == "cuda":
        return {"floor: frozen matmuls": 1 / 1.06, "PEFT bf16": 1.22, "Unsloth-style": 1.1, "LoRAFusion's scheme": 1.06}
    if dropout_p:
        return {"PEFT bf16": 1.5, "PEFT default": 1.5}
    return {"floor: frozen matmuls": 1 / 1.08, "PEFT bf16": 1.2, "PEFT default": 1.35}


def _register(suite: str, name: str, tokens: int, groups: list[Group], rank: int, p: float, headline: bool) -> None:
    device = suite_device(suite)

    @workload(
        "lora_linear",
        f"{name} r{rank}{f', dropout {p:g}' if p else ''} fwd+bwd",
        suite=suite,
        at_least={key: round(ratio, 3) for key, ratio in _aims(p, "cuda" if suite == "gpu" else "cpu").items()},
        headline=headline,
        **work(tokens, groups, rank),
    )
    def build() -> Candidates:
        return layers(tokens, groups, rank, p, device, compile=headline and p == 0 and rank != 64)


for tokens, k, widths, rank in SHAPES:
    named = f"{tokens}x{k}->{'+'.join(map(str, widths))}"
    shown = (tokens, k, widths, rank) in HEADLINE
    _register("cpu", named, tokens, [(k, widths)], rank, 0.0, shown)
    if (tokens, k, widths, rank) in WITH_DROPOUT:
        _register("cpu", named, tokens, [(k, widths)], rank, 0.1, shown)
for rank in (16, 64):
    for dropout in (0.0, 0.1):
        _register("gpu", "Llama-3-8B layer, 7 projections, 8192 tokens", 8192, LLAMA_8B, rank, dropout, True)
