"""rope in Triton: every pair (x[i], x[i + d/2]) turned by its token's angle, float32 arithmetic, one read, one write.

One launch rotates queries and keys: a program has the angles of a few tokens in registers and goes over all their
heads. Heads and tokens may be strided (views into a fused projection); results are contiguous.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .workload import Workload, meta

MAX_PAIRS = 2048  # of a tile: 16 a thread


@triton.jit
def _rotate_heads(
    x_THD, y_THD, token_T, cos_TC, sin_TC, tokens, heads, half, token_stride, head_stride,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    pair = tl.arange(0, HALF)[None, None, :]
    token = token_T[:, None, None].to(tl.int64)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[None, :, None]
        inside = (token < tokens) & (head < heads) & (pair < half)
        x = x_THD + token * token_stride + head * head_stride + pair
        first = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x + half, mask=inside, other=0.0).to(tl.float32)
        cos, sin = cos_TC[:, None, :], sin_TC[:, None, :]
        y = y_THD + (token * heads + head) * (2 * half) + pair
        tl.store(y, (first * cos - second * sin).to(y_THD.dtype.element_ty), mask=inside)
        tl.store(y + half, (second * cos + first * sin).to(y_THD.dtype.element_ty), mask=inside)


@triton.jit
def _rotate(
    q_THD, k_THD, cos_TC, sin_TC, q_out_THD, k_out_THD, tokens, q_heads, k_heads, half, sign,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride,
    TOKENS: tl.constexpr, Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    pair = tl.arange(0, HALF)
    inside = (token < tokens)[:, None] & (pair < half)[None, :]
    at = token.to(tl.int64)[:, None] * half + pair[None, :]
    cos = tl.load(cos_TC + at, mask=inside, other=0.0)
    sin = tl.load(sin_TC + at, mask=inside, other=0.0) * sign
    _rotate_heads(
        q_THD, q_out_THD, token, cos, sin, tokens, q_heads, half, q_token_stride, q_head_stride, Q_HEADS, HALF
    )
    _rotate_heads(
        k_THD, k_out_THD, token, cos, sin, tokens, k_heads, half, k_token_stride, k_head_stride, K_HEADS, HALF
    )


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Launches the kernel; results as the op's schema has them."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    q_out, k_out = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))
    tokens, half = cos.shape
    if q.numel() + k.numel() == 0:
        return q_out, k_out
    block = triton.next_power_of_2(half)
    most = max(1, MAX_PAIRS // block)
    q_heads, k_heads = (min(most, triton.next_power_of_2(max(1, x.shape[1]))) for x in (q, k))
    tile_tokens = max(1, MAX_PAIRS // (block * q_heads))
    _rotate[(triton.cdiv(tokens, tile_tokens),)](
        q, k, cos.contiguous(), sin.contiguous(), q_out, k_out, tokens, q.shape[1], k.shape[1], half,
        -1.0 if inverse else 1.0, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        TOKENS=tile_tokens, Q_HEADS=q_heads, K_HEADS=k_heads, HALF=block, num_warps=4,
    )  # fmt: skip
    return q_out, k_out


def workloads() -> list[Workload]:
    """Heads of SmolLM2-135M, Llama-3-8B (also as views into a fused projection), a 70B model and Gemma 2 9B."""
    listed = []
    for q_heads, k_heads, d, fused in (
        (9, 3, 64, False), (32, 8, 128, False), (32, 8, 128, True), (64, 8, 128, False), (16, 8, 256, False),
    ):  # fmt: skip
        q, k = meta(8192, q_heads, d), meta(8192, k_heads, d)
        if fused:
            q, k, _ = meta(8192, q_heads + 2 * k_heads, d).split((q_heads, k_heads, k_heads), dim=1)
        table = meta(8192, d // 2, dtype=torch.float32)
        name = f"rope: {q_heads} + {k_heads} heads of {d}, 8192 tokens{', strided' if fused else ''}"
        least = 4 * (q.numel() + k.numel()) + 8 * table.numel()
        listed.append(Workload(name, partial(rope, q, k, table, table, False), least))
    return listed
