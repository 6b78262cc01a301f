"""lora_linear on a GPU: the four torch ops.

Their contract stands at the top of csrc/cpu/lora_linear.cpp. The kernels are in lora_linear_skinny.py (S, dS with dB,
dA and dropout's bits; launched by lora_linear_launch.py), lora_linear_gemm.py (the large matmul in Triton) and
lora_linear_hopper.py (the same in Gluon); lora_linear_choice.py picks the way of the large matmul.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .lora_linear_choice import RANKS, matmul
from .lora_linear_gemm import Operands
from .lora_linear_launch import dropout_bits, expand_backward, gather, groups, rounded, shrink
from .workload import Workload, meta


def lora_shrink(
    x: Tensor, lora_a: Sequence[Tensor], scaling: Sequence[float], dropout_p: float, dropout_seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S = [scaling_i * dropout_i(x) A_i^T], [tokens, sum of ranks], and dropout's bits, empty without dropout."""
    x, ranks = x.contiguous(), [a.shape[0] for a in lora_a]
    s = x.new_empty(x.shape[0], sum(ranks))
    words = dropout_bits(dropout_p, dropout_seed, len(ranks), x.shape[0], x.shape[1], x.device)
    bits = x.new_empty(0, dtype=torch.int32) if words is None else words
    if s.numel() == 0 or x.numel() == 0:
        return s.zero_(), bits
    lora_a, factor = rounded(lora_a, x.dtype), _factor(dropout_p, dropout_seed)
    for group, column in groups(ranks):
        scales = [scale * factor for scale in scaling[group]]
        shrink(x, lora_a[group], scales, s[:, column:], words, first=group.start)
    return s, bits


def lora_shrink_backward(
    ds: Tensor,
    x: Tensor,
    ranks: Sequence[int],
    wide: Sequence[bool],
    dropout_p: float,
    dropout_seed: Tensor | None,
    bits: Tensor,
) -> list[Tensor]:
    """dA_i = dS_i^T dropout_i(x), float32 where wide."""
    ds, x = ds.contiguous(), x.contiguous()
    dtype = torch.float32 if any(wide) else x.dtype
    das = [x.new_empty((rank, x.shape[1]), dtype=dtype) for rank in ranks]
    if x.numel() == 0 or ds.numel() == 0:
        das = [da.zero_() for da in das]
    else:
        words = None if dropout_seed is None else bits
        for group, column in groups(list(ranks)):
            gather(ds[:, column:], x, das[group], _factor(dropout_p, dropout_seed), words, first=group.start)
    return [da.to(torch.float32 if w else x.dtype) for da, w in zip(das, wide, strict=True)]


def lora_matmul(
    x: Tensor,
    s: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    biases: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float,
    dropout_seed: Tensor | None,
    bits: Tensor,
    *,
    way: str | None = None,
) -> list[Tensor]:
    """y_i = x W_i^T + S_i B_i^T + bias_i."""
    x, s, column, ys = x.contiguous(), s.contiguous(), 0, []
    for i, (weight, b) in enumerate(zip(weights, rounded(lora_b, x.dtype), strict=True)):
        bias = biases[i].contiguous() if biases else None
        ys.append(matmul(Operands([x], [weight], s[:, column:], [b], bias, None, 1.0, nt=True), way))
        column += b.shape[1]
    return ys


def lora_matmul_backward(
    dys: Sequence[Tensor],
    s: Tensor,
    weights: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    scaling: Sequence[float],
    dropout_p: float,
    dropout_seed: Tensor | None,
    need_dx: bool,
    need_db: bool,
    bits: Tensor | None,
    *,
    way: str | None = None,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dX (empty unless need_dx), dS' and dB_i = dY_i^T S_i (none unless need_db)."""
    dys, s, ranks = [dy.contiguous() for dy in dys], s.contiguous(), [a.shape[0] for a in lora_a]
    features = weights[0].shape[1]
    ds, dbs = ds_and_dbs(dys, s, lora_b, scaling)
    dx = s.new_empty(0)
    if need_dx:
        factor = _factor(dropout_p, dropout_seed)
        words = None if dropout_seed is None else bits
        if words is None:  # dropped for a checkpoint
            words = dropout_bits(dropout_p, dropout_seed, len(dys), s.shape[0], features, s.device)
        lora_a, parts = rounded(lora_a, s.dtype), []
        for group, column in groups(ranks):
            masks = None if words is None else words[group]
            pairs = dys[group], list(weights[group])
            parts.append(matmul(Operands(*pairs, ds[:, column:], lora_a[group], None, masks, factor, nt=False), way))
        dx = parts[0]
        for part in parts[1:]:  # more than three projections, or very large ranks
            dx += part
    return dx, ds, dbs if need_db else []


def ds_and_dbs(
    dys: list[Tensor], s: Tensor, lora_b: Sequence[Tensor], scaling: Sequence[float]
) -> tuple[Tensor, list[Tensor]]:
    """dS = [scaling_i * dY_i B_i] and every dB_i = dY_i^T S_i, in the dtype of B_i."""
    wide = any(b.dtype != s.dtype for b in lora_b)
    ds = torch.empty_like(s)
    dbs = [b.new_empty(b.shape, dtype=torch.float32 if wide else s.dtype) for b in lora_b]
    if s.numel() == 0:
        dbs = [db.zero_() for db in dbs]
    else:
        bs = rounded(lora_b, s.dtype)
        for group, column in groups([b.shape[1] for b in bs]):
            expand_backward(dys[group], s[:, column:], bs[group], scaling[group], ds[:, column:], dbs[group])
    return ds, [db.to(b.dtype) for b, db in zip(lora_b, dbs, strict=True)]


def _factor(p: float, seed: Tensor | None) -> float:
    # Of kept elements.
    return 1.0 if seed is None else 1 / (1 - p)


def workloads() -> list[Workload]:
    """A Llama-3-8B layer at 8192 tokens: q/k/v, gate/up and down, every way of the large matmul."""
    tokens, d, ff, qkv = 8192, 4096, 14336, [4096, 1024, 1024]
    seed = meta(dtype=torch.int64)
    listed = []

    def add(name: str, call: Callable[[], object], read: int, flops: int = 0, **options: Any) -> None:
        listed.append(Workload(f"lora_linear: {name}", call, 2 * read, flops, **options))

    def adapters(k: int, outs: list[int], rank: int) -> tuple[list[Tensor], list[Tensor]]:
        wide = torch.float32
        return [meta(rank, k, dtype=wide) for _ in outs], [meta(n, rank, dtype=wide) for n in outs]

    for rank, k, outs, p in ((16, d, qkv, 0.0), (64, d, qkv, 0.1), (64, ff, [d], 0.0), (128, d, [ff, ff], 0.1)):
        (a, b), s = adapters(k, outs, rank), meta(tokens, rank * len(outs))
        bits = meta(len(outs), tokens, k // 32, dtype=torch.int32)
        x, dys, drop = meta(tokens, k), [meta(tokens, n) for n in outs], (p, seed if p else None)
        ones, size = (
            [1.0] * len(outs),
            f"{tokens} x {k} -> {'+'.join(map(str, outs))} r {rank}{' dropout' if p else ''}",
        )
        ranks = [rank] * len(outs)
        add(f"S {size}", partial(lora_shrink, x, a, ones, *drop), x.numel() + s.numel())
        add(
            f"dS and dB {size}",
            partial(ds_and_dbs, dys, s, b, ones),
            sum(dy.numel() for dy in dys) + 2 * s.numel(),
        )
        add(
            f"dA {size}",
            partial(lora_shrink_backward, s, x, ranks, [True] * len(ranks), *drop, bits),
            x.numel() + s.numel(),
        )

    def forward(way: str, rank: int) -> None:
        a, b = adapters(d, [d], rank)
        lora_matmul(
            meta(tokens, d), meta(tokens, rank), [meta(d, d)], a, b, [meta(d)], [1.0], 0.0, None, meta(0), way=way
        )

    def backward(way: str, outs: list[int], rank: int, masked: bool) -> None:
        a = [meta(rank, d) for _ in outs]
        words = meta(len(outs), tokens, d // 32, dtype=torch.int32) if masked else None
        pairs = [meta(tokens, n) for n in outs], [meta(n, d) for n in outs]
        matmul(Operands(*pairs, meta(tokens, rank * len(outs)), a, None, words, 1.0, nt=False), way)

    def add_matmuls(way: str, count: int, rank: int, masked: bool, architectures: tuple[int, ...]) -> None:
        outs = ([d], [ff, ff], qkv)[count - 1]
        n = sum(outs)
        size, flops = tokens * (n + d) + n * d, 2 * tokens * n * d
        kernel = {"gluon": ("hopper_matmul_kernel",), "cublas": ()}.get(way, ("matmul_kernel",))
        options: dict[str, Any] = {"architectures": architectures, "wgmma": kernel if 90 in architectures else ()}
        options["asynchronous"] = options["wgmma"]
        if count == 1 and not masked:
            call = partial(forward, way, rank)
            add(f"y {tokens} x {d} -> {d} r {rank} bias, {way}", call, size, flops, **options)
        name = f"dX {tokens} x {'+'.join(map(str, outs))} -> {d} r {rank}{' dropout' if masked else ''}, {way}"
        add(name, partial(backward, way, outs, rank, masked), size, flops, **options)

    for count, masked in ((1, False), (1, True), (2, False), (2, True), (3, False), (3, True)):
        add_matmuls("cublas", count, 64, masked, (80, 90, 100))
        add_matmuls("gluon", count, 64, masked, (90,))
        at_rank: dict[tuple[str, int], list[int]] = {}  # a tile's largest rank -> architectures
        for architecture, table in RANKS.items():
            for config, most in table.items():
                if most[masked][count - 1]:
                    at_rank.setdefault((str(config), most[masked][count - 1]), []).append(architecture)
        for (way, rank), architectures in at_rank.items():
            add_matmuls(way, count, rank, masked, tuple(architectures))
    return listed
