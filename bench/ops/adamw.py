"""An optimizer step - global norm, clipping, AdamW, rounding to the parameters' precision - against torch's."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from bench.registry import Candidates, Slow, suite_device, workload
from forge_core.kernels import AdamWTensors, adamw_, gradient_norm

RATE, BETAS, EPS, DECAY, MAX_NORM = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


@dataclass(frozen=True)
class Decoder:
    """The sizes of a decoder's weights; `shards` of them share each along its first dimension."""

    name: str
    layers: int
    hidden: int
    kv: int
    mlp: int
    vocab: int
    tied: bool
    shards: int = 1

    def linears(self) -> list[tuple[int, int]]:
        """[out, in] of all projections."""
        h, kv, mlp = self.hidden, self.kv, self.mlp
        return [(h, h), (kv, h), (kv, h), (h, h), (mlp, h), (mlp, h), (h, mlp)] * self.layers

    def weights(self) -> list[tuple[int, ...]]:
        """Shapes of all parameters on one rank."""
        shapes: list[tuple[int, ...]] = [(self.vocab, self.hidden)] * (1 if self.tied else 2)
        shapes += [*self.linears(), *[(self.hidden,)] * (2 * self.layers + 1)]
        return [(first // self.shards, *rest) for first, *rest in shapes]

    def adapters(self, rank: int) -> list[tuple[int, ...]]:
        """Shapes of LoRA's A and B of all projections."""
        return [shape for n, k in self.linears() for shape in ((rank, k), (n, rank))]


SMOLLM2 = Decoder("SmolLM2-135M", 30, 576, 192, 1536, 49152, tied=True)
LLAMA = Decoder("Llama-3-8B", 32, 4096, 1024, 14336, 128256, tied=False, shards=8)


def _register(suite: str, name: str, shapes: list[tuple[int, ...]], *, low: bool) -> None:
    device = suite_device(suite)
    values = sum(torch.Size(shape).numel() for shape in shapes)

    @workload(
        "adamw_",
        f"{name}, {len(shapes)} tensors, {values / 1e6:.1f} M values",
        suite=suite,
        dtype="float32",
        # Norm: the gradient. Update: gradient, parameter and moments in, all but the gradient out, and its rounding.
        bytes=values * (4.0 + 16 + 12 + (2 if low else 0)),
        note="norm, clipping, update, rounding to bfloat16 where the model is; in place, so a copy is no upper bound",
        headline=True,
    )
    def step() -> Candidates:
        # All candidates update the same tensors.
        masters = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
        gradients = [0.05 * master.detach() for master in masters]
        exp_avg, exp_avg_sq = ([torch.zeros_like(master) for master in masters] for _ in range(2))
        rounded = [master.detach().bfloat16() for master in masters] if low else []
        decays = [DECAY if len(shape) > 1 else 0.0 for shape in shapes]
        own = AdamWTensors(masters, exp_avg, exp_avg_sq, rounded=rounded or None, weight_decays=decays)

        def forge() -> None:
            norm = gradient_norm(gradients)
            adamw_(own, gradients, learning_rate=RATE, betas=BETAS, eps=EPS, norm=norm, max_norm=MAX_NORM)

        def torch_adamw(**implementation: bool) -> torch.optim.AdamW:
            by_decay = {decay: [m for m, d in zip(masters, decays, strict=True) if d == decay] for decay in decays}
            groups = [{"params": members, "weight_decay": decay} for decay, members in by_decay.items()]
            optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=EPS, **implementation)
            for master, m, v in zip(masters, exp_avg, exp_avg_sq, strict=True):
                on = device if implementation.get("fused") else "cpu"
                optimizer.state[master] = {"step": torch.zeros((), device=on), "exp_avg": m, "exp_avg_sq": v}
            return optimizer

        fused, foreach = torch_adamw(fused=True), torch_adamw(foreach=True)

        def write_back() -> None:
            if low:
                torch._foreach_copy_(rounded, masters)

        @torch.no_grad()
        def torch_fused() -> None:
            # The fused kernel divides by grad_scale: clipping takes no pass. It writes the quotient into the gradient.
            fused.grad_scale = ((get_total_norm(gradients) + 1e-6) / MAX_NORM).clamp_min(1.0)  # type: ignore[attr-defined]
            run(fused)

        @torch.no_grad()
        def torch_foreach() -> None:
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            clip_grad_norm_(masters, MAX_NORM)
            run(foreach)

        def run(optimizer: torch.optim.AdamW) -> None:
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient
            optimizer.step()
            write_back()

        return {"forge": forge, "torch fused": torch_fused, "torch foreach": Slow(torch_foreach)}


_register("cpu", f"{SMOLLM2.name} LoRA r 32", SMOLLM2.adapters(32), low=False)
_register("cpu", f"{SMOLLM2.name} bfloat16", SMOLLM2.weights(), low=True)
_register("gpu", f"{LLAMA.name} LoRA r 16", LLAMA.adapters(16), low=False)
_register("gpu", f"{LLAMA.name} bfloat16, 1/8", LLAMA.weights(), low=True)
