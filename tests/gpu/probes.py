"""Triton kernels with known faults, for the tests of the ahead-of-time gate."""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

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


@gluon.jit
def two_sums_kernel(x_MN, y_MN, EARLY: gl.constexpr, num_warps: gl.constexpr):
    COPY: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    at = gl.arange(0, 64, gl.SliceLayout(1, COPY))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, COPY))[None, :]
    tile = gl.allocate_shared_memory(gl.bfloat16, [64, 64], SHARED, gl.load(x_MN + at))
    s = gl.zeros([64, 64], gl.float32, ACC)
    t = warpgroup_mma(tile, tile, gl.zeros([64, 64], gl.float32, ACC), is_async=True)
    for i in range(8):  # noqa: B007
        s = warpgroup_mma(tile, tile, s, is_async=True)
        if EARLY:
            t = warpgroup_mma_wait(1, deps=(t,)) * 2.0  # while the product of s is on its way
        t = warpgroup_mma(tile, tile, t, is_async=True)
        s = warpgroup_mma_wait(1 if EARLY else 0, deps=(s,)) * 2.0
    t = warpgroup_mma_wait(0, deps=(t,))
    at = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None] * 64 + gl.arange(0, 64, gl.SliceLayout(0, ACC))[None, :]
    gl.store(y_MN + at, (s + t).to(gl.bfloat16))


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


def two_sums(early: bool) -> None:
    """With `early` one sum is scaled while the products of another are on their way: ptxas then waits for all."""
    x = meta(64, 64)
    two_sums_kernel[(1,)](x, x, EARLY=early, num_warps=4)
