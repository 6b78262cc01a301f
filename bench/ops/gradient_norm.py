"""gradient_norm over the adapters of a decoder against torch's total norm."""

import torch
from torch.nn.utils import get_total_norm

from bench.ops.adamw import LLAMA, SMOLLM2
from bench.registry import Candidates, suite_device, workload
from forge_core.kernels import gradient_norm

SHAPES = {"cpu": [("SmolLM2-135M LoRA r 32", SMOLLM2.adapters(32))], "gpu": [("Llama-3-8B 1/8", LLAMA.weights())]}


def _register(suite: str, name: str, shapes: list[tuple[int, ...]]) -> None:
    device = suite_device(suite)
    values = sum(torch.Size(shape).numel() for shape in shapes)

    @workload(
        "gradient_norm",
        f"{name}, {len(shapes)} tensors, {values / 1e6:.1f} M values",
        suite=suite,
        dtype="float32",
        bytes=4.0 * values,
    )
    def build() -> Candidates:
        gradients = [1e-3 * torch.randn(shape, device=device) for shape in shapes]
        return {"forge": lambda: gradient_norm(gradients), "get_total_norm": lambda: get_total_norm(gradients)}


for suite, rows in SHAPES.items():
    for name, shapes in rows:
        _register(suite, name, shapes)
