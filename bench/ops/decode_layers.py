"""A decoding step through layers of SmolLM2-135M's shape, more weights than a cache holds, and its greedy token."""

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.registry import Candidates, workload
from forge_core.kernels import DecodeLayer, DecodeLinear, DecodeStack, decode_layers, linear_argmax

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, D, VOCAB = 12, 576, 1536, 9, 3, 64, 49152  # 85 MB of layers
LENGTH, CAPACITY = 100, 128
SIZES = {
    "q": (HEADS * D, HIDDEN),
    "k": (KV_HEADS * D, HIDDEN),
    "v": (KV_HEADS * D, HIDDEN),
    "o": (HIDDEN, HEADS * D),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
WEIGHTS = sum(rows * columns for rows, columns in SIZES.values())


def _matrix(rows: int, columns: int) -> Tensor:
    return (torch.randn(rows, columns) / columns**0.5).bfloat16()


def _register(sequences: int) -> None:
    attention = 2 * sequences * LENGTH * KV_HEADS * D  # elements of keys and values

    @workload(
        "decode_layers",
        f"{sequences} sequences of {LENGTH}, {LAYERS} layers of {HIDDEN}/{INNER}, {HEADS}/{KV_HEADS} heads, D {D}",
        flops=2.0 * LAYERS * (sequences * WEIGHTS + attention * HEADS / KV_HEADS),
        bytes=2.0 * LAYERS * (WEIGHTS + attention),
    )
    def forward() -> Candidates:
        def layer() -> DecodeLayer:
            linears = {name: DecodeLinear(_matrix(*size)) for name, size in SIZES.items()}
            norms = {name: torch.ones(HIDDEN, dtype=torch.bfloat16) for name in ("pre_attention", "pre_mlp")}
            return DecodeLayer(**linears, **norms)

        stack = DecodeStack([layer() for _ in range(LAYERS)], q_heads=HEADS, scale=D**-0.5)
        x, positions = torch.randn(sequences, HIDDEN).bfloat16(), torch.full((sequences,), LENGTH - 1)
        angles = torch.arange(CAPACITY)[:, None] * torch.rand(D // 2)
        shape = (sequences, KV_HEADS, CAPACITY, D)
        keys, values = ([torch.randn(shape).bfloat16() for _ in range(LAYERS)] for _ in range(2))

        def step(backend: str) -> Tensor:
            return decode_layers(x, positions, [(angles.cos(), angles.sin())], keys, values, stack, backend=backend)

        return {"forge": lambda: step("auto"), "eager": lambda: step("reference")}


@workload(
    "linear_argmax",
    f"32x{HIDDEN}->{VOCAB}",
    flops=2.0 * 32 * HIDDEN * VOCAB,
    bytes=2.0 * HIDDEN * VOCAB,
)
def _argmax() -> Candidates:
    hidden, head = torch.randn(32, HIDDEN).bfloat16(), _matrix(VOCAB, HIDDEN)
    return {
        "forge": lambda: linear_argmax(hidden, head),
        "F.linear, max": lambda: F.linear(hidden, head).max(dim=-1).indices,
    }


for count in (1, 8, 32):
    _register(count)
