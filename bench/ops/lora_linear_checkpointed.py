"""A layer's projections under full activation checkpointing: recomputing the adapters is to cost no base matmul.

Everyone runs the same block in torch's non-reentrant checkpoint, which recomputes until the last saved tensor is there.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.ops.lora_linear import LLAMA_8B, Group, Run, adapters_as, methods, projections
from bench.registry import Candidates, Thunk, suite_device, workload
from forge_core.kernels import swiglu

SMOLLM2: list[Group] = [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))]
PEERS = ("forge", "floor: frozen matmuls", "PEFT bf16", "Unsloth-style", "LoRAFusion's scheme")


def layer(tokens: int, groups: list[Group], rank: int, device: str) -> Candidates:
    """Candidates that run q/k/v, o, gate/up with SwiGLU and down in one checkpoint, forward and backward."""
    x = torch.randn(tokens, groups[0][0], dtype=torch.bfloat16, device=device, requires_grad=True)
    made = [projections(k, widths, rank, device) for k, widths in groups]
    outs = (*groups[0][1][1:], groups[-1][1][0])
    upstream = [torch.randn(tokens, n, dtype=torch.bfloat16, device=device) for n in outs]

    def candidate(run: Run, dtype: torch.dtype | None) -> Thunk:
        (qkv, o, gate_up, down) = parts = [(weights, *adapters_as(dtype, a, b)) for weights, a, b in made]
        trained = [t for _, a, b in parts for t in (*a, *b) if dtype]

        def block(x: Tensor) -> tuple[Tensor, ...]:
            q, k, v = run(x, *qkv)
            (h,) = run(q, *o)
            return k, v, *run(swiglu(*run(h, *gate_up)), *down)

        return lambda: torch.autograd.grad(checkpoint(block, x, use_reentrant=False), [x, *trained], upstream)

    known = methods(0.0)
    return {name.removeprefix("floor: "): candidate(*known[name]) for name in PEERS}


def _register(suite: str, name: str, tokens: int, groups: list[Group], rank: int) -> None:
    device = suite_device(suite)
    base = [k * n for k, widths in groups for n in widths]
    skinny = [rank * (k + n) for k, widths in groups for n in widths]

    @workload(
        "lora_linear",
        f"{name}, {tokens} tokens r{rank}, checkpointed fwd+bwd",
        suite=suite,
        flops=2.0 * tokens * (3 * sum(base) - base[-1]) + 8.0 * tokens * sum(skinny),
        # A down projection of 14336 saved pays for adapters of rank 16; one of 1536 does not for rank 32: at most 0.96.
        at_least={"frozen matmuls": 1.0} if suite == "gpu" else None,
        note="FLOPs: forward, dX, and all base matmuls but the last again; the skinny products once more in forward.",
    )
    def build() -> Candidates:
        return layer(tokens, groups, rank, device)


_register("cpu", "SmolLM2-135M layer", 2048, SMOLLM2, 32)
_register("gpu", "Llama-3-8B layer", 8192, LLAMA_8B, 16)
