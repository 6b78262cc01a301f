"""The large matmul of lora_linear in Triton: c = sum_i x_i W_i + sum_i dropout_i(S_i B_i) + bias in one accumulator.

Forward (NT): c = y, x = x, W [N, K], S, B [N, r]. Backward (NN): c = dX, x_i = dY_i, W_i [N_i, K], S = dS', B_i = A_i
[r_i, K]; up to three projections and one dX. The adapter's product comes first: it can be masked by the dropout bits
before the main loop adds to it. A program keeps taking tiles; TMA descriptors on sm_90 and later, pointers on sm_80.

Without its main loop the kernel writes the adapter's product alone, to which cuBLAS then adds the rest (beta = 1).
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .lora_linear_skinny import unpacked
from .workload import multiprocessors


@triton.jit
def _adapter(
    acc, s, b, words, rank, before, columns, factor, rm, rn, n_begin, M, N, stream: tl.constexpr,
    R: tl.constexpr, NT: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rr = tl.arange(0, R)
    live = rm[:, None] < M
    at = s + rm[:, None].to(tl.int64) * columns + before + rr[None, :]
    s_MR = tl.load(at, mask=live & (rr[None, :] < rank), other=0.0)
    at = b + (rn[None, :] * rank + rr[:, None] if NT else rr[:, None].to(tl.int64) * N + rn[None, :])
    b_RN = tl.load(at, mask=(rr[:, None] < rank) & (rn[None, :] < N), other=0.0).to(s_MR.dtype)
    if DROPOUT:
        row_words = (N + 31) // 32
        rw = n_begin // 32 + tl.arange(0, BLOCK_N // 32)
        at = words + (stream * M + rm[:, None]).to(tl.int64) * row_words + rw[None, :]
        packed = tl.load(at, mask=live & (rw[None, :] < row_words), other=0)
        product = tl.dot(s_MR, b_RN, input_precision="ieee") * factor
        acc += tl.where(unpacked(packed, BLOCK_M, BLOCK_N // 32), product, 0.0)
    else:
        acc = tl.dot(s_MR, b_RN, acc, input_precision="ieee")
    return acc


@triton.jit
def _main_loop(
    acc, x, w, K, m_begin, n_begin, rm, rn, M, N,
    NT: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    if TMA:
        for k in range(0, K, BLOCK_K):
            x_MK = x.load([m_begin, k])
            w_KN = w.load([n_begin, k]).T if NT else w.load([k, n_begin])
            acc = tl.dot(x_MK, w_KN, acc)
    else:
        # Rows and columns beyond the end wrap around: what they compute is not stored.
        rk = tl.arange(0, BLOCK_K)
        rows = x + (rm % M)[:, None].to(tl.int64) * K + rk[None, :]
        rn = rn % N
        columns = w + (rn[None, :].to(tl.int64) * K + rk[:, None] if NT else rk[:, None].to(tl.int64) * N + rn[None, :])
        for k in range(0, K, BLOCK_K):
            if EVEN_K:
                x_MK = tl.load(rows)
                w_KN = tl.load(columns)
            else:
                x_MK = tl.load(rows, mask=rk[None, :] < K - k, other=0.0)
                w_KN = tl.load(columns, mask=rk[:, None] < K - k, other=0.0)
            acc = tl.dot(x_MK, w_KN, acc)
            rows += BLOCK_K
            columns += BLOCK_K if NT else BLOCK_K * N.to(tl.int64)
    return acc


@triton.jit(do_not_specialize=["factor"], do_not_specialize_on_alignment=["M"])
def matmul_kernel(
    c, bias, x0, x1, x2, w0, w1, w2, k0, k1, k2, s, b0, b1, b2, r0, r1, r2, words, columns, factor, M, N,
    GROUP: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, NT: tl.constexpr, TMA: tl.constexpr,
    MAIN: tl.constexpr, BIAS: tl.constexpr, DROPOUT: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """c of the module's docstring: tiles of BLOCK_M x BLOCK_N, every program many of them."""
    m_tiles = tl.cdiv(M, BLOCK_M)
    n_tiles = tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        # GROUP_M row tiles are walked column by column, so that the programs in flight share x and W in L2.
        first = tile // (GROUP_M * n_tiles) * GROUP_M
        height = tl.minimum(m_tiles - first, GROUP_M)
        m_begin = (first + tile % (GROUP_M * n_tiles) % height) * BLOCK_M
        n_begin = tile % (GROUP_M * n_tiles) // height * BLOCK_N
        rm = m_begin + tl.arange(0, BLOCK_M)
        rn = n_begin + tl.arange(0, BLOCK_N)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc = _adapter(
            acc, s, b0, words, r0, 0, columns, factor, rm, rn, n_begin, M, N, 0, R0, NT, DROPOUT, BLOCK_M, BLOCK_N
        )
        if GROUP > 1:
            acc = _adapter(
                acc, s, b1, words, r1, r0, columns, factor, rm, rn, n_begin, M, N, 1, R1, NT, DROPOUT, BLOCK_M, BLOCK_N
            )
        if GROUP > 2:
            at = r0 + r1
            acc = _adapter(
                acc, s, b2, words, r2, at, columns, factor, rm, rn, n_begin, M, N, 2, R2, NT, DROPOUT, BLOCK_M, BLOCK_N
            )
        if MAIN:
            acc = _main_loop(acc, x0, w0, k0, m_begin, n_begin, rm, rn, M, N, NT, TMA, EVEN_K, BLOCK_K)
            if GROUP > 1:
                acc = _main_loop(acc, x1, w1, k1, m_begin, n_begin, rm, rn, M, N, NT, TMA, EVEN_K, BLOCK_K)
            if GROUP > 2:
                acc = _main_loop(acc, x2, w2, k2, m_begin, n_begin, rm, rn, M, N, NT, TMA, EVEN_K, BLOCK_K)
        if BIAS:
            acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        if TMA:
            c.store([m_begin, n_begin], acc.to(c.dtype))
        else:
            at = c + rm[:, None].to(tl.int64) * N + rn[None, :]
            tl.store(at, acc.to(c.dtype.element_ty), mask=(rm[:, None] < M) & (rn[None, :] < N))


@dataclass(frozen=True)
class Config:
    """Tile of a program, and how it is computed."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    tma: bool = False
    group_m: int = 8

    def __str__(self) -> str:
        return f"triton {self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{' tma' if self.tma else ''}"


@dataclass(frozen=True)
class Operands:
    """One matmul of the module's docstring; contiguous tensors, adapters in their own dtype.

    Attributes:
        xs, ws: pairs of the main loop; ws [N, K] if nt, else [K, N].
        s: [M, columns], the projections' blocks side by side; `before` columns of it come first and are not used.
        bs: [N, r] if nt, else [r, N].
        words: dropout bits of the projections, [projections, M, ceil(N / 32)], or None.
    """

    xs: list[Tensor]
    ws: list[Tensor]
    s: Tensor
    bs: list[Tensor]
    bias: Tensor | None
    words: Tensor | None
    factor: float
    nt: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Of the result."""
        return self.s.shape[0], self.bs[0].shape[0 if self.nt else 1]

    @property
    def ranks(self) -> list[int]:
        """Of the projections."""
        return [b.shape[1 if self.nt else 0] for b in self.bs]


def padded_rank(rank: int) -> int:
    """Width of a rank's tile."""
    return max(16, triton.next_power_of_2(rank))


def three(values: list) -> list:
    """The list as the three arguments of a kernel that takes up to three projections."""
    return values + [values[0]] * (3 - len(values))


def launch(operands: Operands, config: Config, main: bool = True) -> Tensor:
    """Runs `matmul_kernel`; without `main`, only the adapter's product and bias."""
    o, (m, n) = operands, operands.shape
    out = o.s.new_empty(m, n)
    reductions = [x.shape[1] for x in o.xs] if main else [0]
    c, xs, ws = out, o.xs, o.ws
    if config.tma and main:
        w_block = [config.n, config.k] if o.nt else [config.k, config.n]
        c = TensorDescriptor.from_tensor(out, [config.m, config.n])
        xs = [TensorDescriptor.from_tensor(x, [config.m, config.k]) for x in xs]
        ws = [TensorDescriptor.from_tensor(w, w_block) for w in ws]
    tiles = triton.cdiv(m, config.m) * triton.cdiv(n, config.n)
    programs = min(tiles, multiprocessors(out.device) * max(1, 8 // config.warps)) if main else tiles
    ranks = o.ranks
    matmul_kernel[(programs,)](
        c, out if o.bias is None else o.bias, *three(xs), *three(ws), *three(reductions), o.s, *three(o.bs),
        *three(ranks), out if o.words is None else o.words, o.s.stride(0), o.factor, m, n,
        GROUP=len(ranks), R0=padded_rank(ranks[0]), R1=padded_rank(three(ranks)[1]), R2=padded_rank(three(ranks)[2]),
        NT=o.nt, TMA=config.tma and main, MAIN=main, BIAS=o.bias is not None, DROPOUT=o.words is not None,
        EVEN_K=all(k % config.k == 0 for k in reductions), BLOCK_M=config.m, BLOCK_N=config.n, BLOCK_K=config.k,
        GROUP_M=config.group_m, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
