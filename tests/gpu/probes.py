"""Triton kernels with known faults, for the tests of the ahead-of-time gate."""

import torch
import triton
import triton.language as tl

from forge_core.kernels.gpu.workload import meta


@triton.jit
def sum_kernel(x_N, y_N, BLOCK: tl.constexpr):
    x = tl.load(x_N + tl.arange(0, BLOCK))
    tl.store(y_N + tl.arange(0, BLOCK), x / tl.sum(x, axis=0))


@triton.jit
def matmul_kernel(a_MK, b_KN, c_MN, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    a = tl.load(a_MK + m * K + k[None, :])
    b = tl.load(b_KN + k[:, None] * N + n)
    tl.store(c_MN + m * N + n, tl.dot(a, b).to(tl.bfloat16))


@triton.jit
def five_sums_kernel(a_MK, b_KN, c_MN, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    s = tl.zeros([M, N], tl.float32)
    t = tl.zeros([M, N], tl.float32)
    u = tl.zeros([M, N], tl.float32)
    v = tl.zeros([M, N], tl.float32)
    w = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        a = tl.load(a_MK + m * K + k[None, :] + step)
        b = tl.load(b_KN + k[:, None] * N + n + step)
        s = tl.dot(a, b, s)
        t = tl.dot(a, b + 1, t)
        u = tl.dot(a, b + 2, u)
        v = tl.dot(a, b + 3, v)
        w = tl.dot(a, b + 4, w)
    tl.store(c_MN + m * N + n, (s * t * u * v * w).to(tl.bfloat16))


def sum_in_few_registers() -> None:
    """64 values a thread in at most 32 registers."""
    x = meta(8192, dtype=torch.float32)
    sum_kernel[(1,)](x, x, BLOCK=8192, num_warps=4, maxnreg=32)


def matmul(rows: int) -> None:
    """A tile of at least 64 rows is a Hopper matmul instruction, a smaller one is not."""
    x = meta(128, 128)
    matmul_kernel[(1,)](x, x, x, M=rows, N=64, K=64, num_warps=4)


def five_sums(columns: int) -> None:
    """Five sums of so many columns: 5 x 128 are more than the 512 columns of tensor memory of sm_100."""
    x = meta(128, 128)
    five_sums_kernel[(1,)](x, x, x, 7, M=128, N=columns, K=64, num_warps=8)
