"""lora_linear on a GPU, part by part: what decides between the ways of its large matmul, and what its passes reach.

1. The matmul with two operand pairs in each of its ways, against cuBLAS on the base alone; forward (NT) and dX (NN).
2. cuBLAS on augmented storage, rows of x and W 64 elements longer: [x | S'] [W | B]^T in one call.
3. What adding to an existing result costs cuBLAS (beta = 1).
4. The skinny passes against a copy of as many bytes.
"""

import torch
from torch import Tensor

from bench.registry import Candidates, Missing, workload

TOKENS, RANK = 8192, 16
# Llama-3-8B: name, in, out. The four distinct shapes of its seven projections.
SHAPES = [("q, o", 4096, 4096), ("k, v", 4096, 1024), ("gate, up", 4096, 14336), ("down", 14336, 4096)]
PAD = 64
WAYS = ["cublas", "gluon", "triton 128x256x64 w8 s3 tma", "triton 128x128x64 w8 s4 tma"]
NO_GPU = Missing("needs a CUDA GPU")


def _randn(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).bfloat16()


def _register_ways(name: str, k: int, n: int, rank: int, *, forward: bool, dropout: bool) -> None:
    kind = "y" if forward else "dX"

    @workload(
        "lora_linear",
        f"{kind} of {name}, {TOKENS} x {k if forward else n} -> {n if forward else k} r{rank}"
        f"{', dropout' if dropout else ''}, way by way",
        suite="gpu",
        flops=2.0 * TOKENS * (k * n + rank * (n if forward else k)),
        bytes=2.0 * (TOKENS * (k + n) + k * n),
        at_least={"cuBLAS, base alone": 0.97},
    )
    def build() -> Candidates:
        if not torch.cuda.is_available():
            return {"forge": NO_GPU, "cuBLAS, base alone": NO_GPU} | {way: NO_GPU for way in WAYS}
        from forge_core.kernels.gpu.lora_linear_choice import matmul, ways
        from forge_core.kernels.gpu.lora_linear_gemm import Operands
        from forge_core.kernels.gpu.lora_linear_launch import dropout_bits

        x, weight = _randn(TOKENS, k if forward else n), _randn(n, k, scale=k**-0.5)
        s, adapter = _randn(TOKENS, rank), _randn(*((n, rank) if forward else (rank, k)), scale=rank**-0.5)
        seed = torch.zeros((), dtype=torch.int64, device="cuda") if dropout else None
        words = dropout_bits(0.1, seed, 1, TOKENS, k, x.device)
        operands = Operands([x], [weight], s, [adapter], None, words, 1.0, nt=forward)
        able = ways(operands, torch.cuda.get_device_capability())
        other = weight.t() if forward else weight
        candidates: Candidates = {"forge": lambda: matmul(operands), "cuBLAS, base alone": lambda: torch.mm(x, other)}
        for way in dict.fromkeys(WAYS + able):
            fits = way in able
            candidates[way] = (lambda way=way: matmul(operands, way)) if fits else Missing("not for this GPU or shape")
        return candidates


def _register_cublas(name: str, k: int, n: int) -> None:
    flops, bytes = 2.0 * TOKENS * k * n, 2.0 * (TOKENS * (k + n) + k * n)

    @workload(
        "lora_linear",
        f"cuBLAS for {name}, {TOKENS} x {k} -> {n}",
        suite="gpu",
        flops=flops,
        bytes=bytes,
        note=f"forge: torch.mm. Rows {PAD} longer: base and adapter in one call; beta = 1: added to what is there.",
    )
    def build() -> Candidates:
        names = ["rows longer, base only", "rows longer, base and adapter", "beta = 1", "dX", "dX, beta = 1"]
        if not torch.cuda.is_available():
            return {"forge": NO_GPU} | {name: NO_GPU for name in names}
        x, weight = _randn(TOKENS, k), _randn(n, k, scale=k**-0.5)
        wide_x, wide_weight = _randn(TOKENS, k + PAD), _randn(n, k + PAD, scale=k**-0.5)
        y, dx = _randn(TOKENS, n), _randn(TOKENS, k)
        thunks = [
            lambda: torch.mm(wide_x[:, :k], wide_weight[:, :k].t()),
            lambda: torch.mm(wide_x, wide_weight.t()),
            lambda: y.addmm_(x, weight.t(), beta=1.0, alpha=1e-3),
            lambda: torch.mm(y, weight),
            lambda: dx.addmm_(y, weight, beta=1.0, alpha=1e-3),
        ]
        return {"forge": lambda: torch.mm(x, weight.t())} | dict(zip(names, thunks, strict=True))


def _register_skinny(k: int, outs: tuple[int, ...], rank: int, dropout: bool) -> None:
    named = f"{TOKENS} x {k} -> {'+'.join(map(str, outs))} r{rank}{', dropout' if dropout else ''}"
    total, p = rank * len(outs), 0.1 if dropout else 0.0
    read = {"S": k, "dA": k, "dS and dB": sum(outs)}
    for what, width in read.items():

        @workload(
            "lora_linear",
            f"{what}, {named}",
            suite="gpu",
            flops=2.0 * TOKENS * rank * sum(outs) * 2 if what == "dS and dB" else 2.0 * TOKENS * total * k,
            bytes=2.0 * TOKENS * (width + total),
            at_least={"copy": 0.85},
            note="copy: as many bytes, half of them read and half written.",
        )
        def build(what: str = what, width: int = width) -> Candidates:
            if not torch.cuda.is_available():
                return {"forge": NO_GPU, "copy": NO_GPU, "torch, bf16 adapters": NO_GPU}
            from forge_core.kernels.gpu import lora_linear as ops

            x, s = _randn(TOKENS, k), _randn(TOKENS, total)
            a = [torch.randn(rank, k, device="cuda") / k**0.5 for _ in outs]
            b = [torch.randn(n, rank, device="cuda") / rank**0.5 for n in outs]
            dys, ones = [_randn(TOKENS, n) for n in outs], [1.0] * len(outs)
            seed = torch.zeros((), dtype=torch.int64, device="cuda") if dropout else None
            _, bits = ops.lora_shrink(x, a, ones, p, seed)
            half_a, half_b = torch.cat(a).bfloat16(), [t.bfloat16() for t in b]
            source = torch.empty(TOKENS * width, dtype=torch.bfloat16, device="cuda")
            target = torch.empty_like(source)
            parts = s.split(rank, 1)
            calls = {
                "S": lambda: ops.lora_shrink(x, a, ones, p, seed),
                "dA": lambda: ops.lora_shrink_backward(s, x, [rank] * len(outs), [True] * len(outs), p, seed, bits),
                "dS and dB": lambda: ops.ds_and_dbs(dys, s, b, ones),
            }
            torchs = {
                "S": lambda: torch.mm(x, half_a.t()),
                "dA": lambda: torch.mm(s.t(), x),
                "dS and dB": lambda: [(dy @ t, dy.t() @ si) for dy, t, si in zip(dys, half_b, parts, strict=True)],
            }
            half = source.numel() // 2
            return {
                "forge": calls[what],
                "copy": lambda: target[:half].copy_(source[:half]),
                "torch, bf16 adapters": torchs[what],
            }


for name, k, n in SHAPES:
    for forward in (True, False):
        _register_ways(name, k, n, RANK, forward=forward, dropout=False)
_register_ways("q, o", 4096, 4096, RANK, forward=False, dropout=True)
_register_ways("q, o", 4096, 4096, 64, forward=True, dropout=False)
for name, k, n in SHAPES:
    _register_cublas(name, k, n)
for rank, dropout in ((16, False), (64, False), (16, True)):
    _register_skinny(4096, (4096, 1024, 1024), rank, dropout)
_register_skinny(14336, (4096,), 16, False)
