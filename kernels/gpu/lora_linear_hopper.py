"""The large matmul of lora_linear for Hopper, in Gluon: one stream of k-steps through TMA and wgmma.

c = sum_i dropout_i(S_i B_i) + sum_i x_i W_i + bias, operands as in lora_linear_gemm.py. A program owns 128 x 256 tiles
of c, one after another. The steps of a tile are those of the adapters, then those of every (x_i, W_i), 64 columns each,
through one ring of shared-memory slots; loads run STAGES - 1 steps ahead, over the edge of a tile into the next one, so
that the epilogue of a tile is hidden behind the loads of its successor. Two warpgroups multiply 64 rows each; a slot is
loaded again once both have finished with it. tests/gpu/gluon_simulator.py runs this file without a GPU.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .lora_linear_gemm import Operands, three
from .workload import multiprocessors

BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M = 128, 256, 64, 16


@constexpr_function
def _steps(rank: int, block: int) -> int:
    return -(-rank // block)


@constexpr_function
def _depth(rank: int, step: int, block: int) -> int:
    return min(block, rank - step * block)


@gluon.jit
def _origin(tile, m_tiles, n_tiles, GROUP_M: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    # GROUP_M row tiles are walked column by column, so that the programs in flight share x and W in L2.
    first = tile // (GROUP_M * n_tiles) * GROUP_M
    height = gl.minimum(m_tiles - first, GROUP_M)
    m = first + tile % (GROUP_M * n_tiles) % height
    return m * BLOCK_M, tile % (GROUP_M * n_tiles) // height * BLOCK_N


@gluon.jit
def _copy(x, column, w, k, m, n, x_slot, w_slot, ready, NT: gl.constexpr):
    tma.async_copy_global_to_shared(x, [m, column], ready, x_slot)
    if NT:
        tma.async_copy_global_to_shared(w, [n, k], ready, w_slot)
    else:
        tma.async_copy_global_to_shared(w, [k, n], ready, w_slot)


@gluon.jit
def _load(
    operands, step, m, n, x_slot, w_slot, ready,
    GROUP: gl.constexpr, A0: gl.constexpr, A1: gl.constexpr, A2: gl.constexpr, NT: gl.constexpr, BLOCK_K: gl.constexpr,
    BYTES: gl.constexpr,
):  # fmt: skip
    """Starts the copies of one step of a tile: A0 + A1 + A2 steps of the adapters, then those of every pair."""
    x0, x1, x2, w0, w1, w2, steps0, steps1, s, b0, b1, b2, before1, before2 = operands
    mbarrier.expect(ready, BYTES)
    if step < A0 + A1 + A2:
        if step < A0:
            _copy(s, step * BLOCK_K, b0, step * BLOCK_K, m, n, x_slot, w_slot, ready, NT)
        elif step < A0 + A1:
            k = (step - A0) * BLOCK_K
            _copy(s, before1 + k, b1, k, m, n, x_slot, w_slot, ready, NT)
        else:
            k = (step - A0 - A1) * BLOCK_K
            _copy(s, before2 + k, b2, k, m, n, x_slot, w_slot, ready, NT)
    else:
        step -= A0 + A1 + A2
        if GROUP == 1:
            _copy(x0, step * BLOCK_K, w0, step * BLOCK_K, m, n, x_slot, w_slot, ready, NT)
        else:
            if step < steps0:
                _copy(x0, step * BLOCK_K, w0, step * BLOCK_K, m, n, x_slot, w_slot, ready, NT)
            elif step < steps0 + steps1:
                k = (step - steps0) * BLOCK_K
                _copy(x1, k, w1, k, m, n, x_slot, w_slot, ready, NT)
            else:
                k = (step - steps0 - steps1) * BLOCK_K
                _copy(x2, k, w2, k, m, n, x_slot, w_slot, ready, NT)


@gluon.jit
def _load_next(
    operands, at, m_tiles, n_tiles, steps, x_ring, w_ring, ready,
    GROUP: gl.constexpr, A0: gl.constexpr, A1: gl.constexpr, A2: gl.constexpr, NT: gl.constexpr, BLOCK_K: gl.constexpr,
    BYTES: gl.constexpr, GROUP_M: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts the load at (tile, step, slot, row, column) and moves on, into the next tile after the last step."""
    tile, step, slot, m, n = at
    if tile < m_tiles * n_tiles:
        _load(
            operands, step, m, n, x_ring.index(slot), w_ring.index(slot), ready.index(slot), GROUP, A0, A1, A2, NT,
            BLOCK_K, BYTES,
        )  # fmt: skip
    slot += 1
    if slot == STAGES:
        slot = 0
    step += 1
    if step == steps:
        step = 0
        tile += gl.num_programs(0)
        m, n = _origin(tile, m_tiles, n_tiles, GROUP_M, BLOCK_M, BLOCK_N)
    return tile, step, slot, m, n


@gluon.jit
def _multiply(acc, slot, phase, x_ring, w_ring, ready, NT: gl.constexpr, DEPTH: gl.constexpr, STAGES: gl.constexpr):
    """Waits for a slot and multiplies the first DEPTH columns of its step; afterwards the step before it is done."""
    mbarrier.wait(ready.index(slot), phase)
    x_tile = x_ring.index(slot).slice(0, DEPTH, dim=1)
    if NT:
        w_tile = w_ring.index(slot).slice(0, DEPTH, dim=1).permute((1, 0))
    else:
        w_tile = w_ring.index(slot).slice(0, DEPTH, dim=0)
    acc = warpgroup_mma(x_tile, w_tile, acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return acc, slot, phase


@gluon.jit
def _keep(words, stream: gl.constexpr, m, n, M, N, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Dropout bits of a tile as booleans, in the layout of the accumulator."""
    rm = m + gl.arange(0, BLOCK_M)
    rw = n // 32 + gl.arange(0, BLOCK_N // 32)
    row_words = (N + 31) // 32
    at = words + (stream * M + rm)[:, None].to(gl.int64) * row_words + rw[None, :]
    packed = gl.load(at, mask=(rm < M)[:, None] & (rw < row_words)[None, :], other=0)
    bits = (packed[:, :, None] >> gl.arange(0, 32)[None, None, :]) & 1
    return gl.set_auto_layout(bits.reshape(BLOCK_M, BLOCK_N), LAYOUT) != 0


@gluon.jit
def hopper_matmul_kernel(
    c, bias, x0, x1, x2, w0, w1, w2, steps0, steps1, steps2, s, b0, b1, b2, before1, before2, words, factor, M, N,
    GROUP: gl.constexpr, R0: gl.constexpr, R1: gl.constexpr, R2: gl.constexpr, NT: gl.constexpr, BIAS: gl.constexpr,
    DROPOUT: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """c of the module's docstring; `operands` of a group of fewer than three are repeated and not read."""
    dtype: gl.constexpr = x0.dtype
    W_SHAPE: gl.constexpr = w0.block_type.shape
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 16])
    RANKS: gl.constexpr = (R0, R1, R2)
    A0: gl.constexpr = _steps(R0, BLOCK_K)
    A1: gl.constexpr = _steps(R1, BLOCK_K) if GROUP > 1 else 0
    A2: gl.constexpr = _steps(R2, BLOCK_K) if GROUP > 2 else 0
    BYTES: gl.constexpr = (BLOCK_M + BLOCK_N) * BLOCK_K * 2

    x_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x0.layout)
    w_ring = gl.allocate_shared_memory(dtype, [STAGES, W_SHAPE[0], W_SHAPE[1]], w0.layout)
    c_tile = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], c.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)

    m_tiles = gl.cdiv(M, BLOCK_M)
    n_tiles = gl.cdiv(N, BLOCK_N)
    tiles = m_tiles * n_tiles
    main_steps = steps0
    if GROUP > 1:
        main_steps += steps1
    if GROUP > 2:
        main_steps += steps2
    steps = main_steps + (A0 + A1 + A2)

    operands = (x0, x1, x2, w0, w1, w2, steps0, steps1, s, b0, b1, b2, before1, before2)
    first = gl.program_id(0)
    row, column = _origin(first, m_tiles, n_tiles, GROUP_M, BLOCK_M, BLOCK_N)
    ahead = (first, 0, 0, row, column)  # the next load: tile, step, slot, row, column
    for lead in gl.static_range(STAGES - 1):  # noqa: B007
        ahead = _load_next(
            operands, ahead, m_tiles, n_tiles, steps, x_ring, w_ring, ready, GROUP, A0, A1, A2, NT, BLOCK_K, BYTES,
            GROUP_M, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
    slot = 0
    phase = 0
    for tile in range(first, tiles, gl.num_programs(0)):
        m, n = _origin(tile, m_tiles, n_tiles, GROUP_M, BLOCK_M, BLOCK_N)
        acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, ACC)
        for i in gl.static_range(GROUP):
            if DROPOUT and i > 0:
                # Elements that this projection drops keep the sum so far, which waits in the tile of c.
                tma.store_wait(0)
                c_tile.store(acc.to(dtype))
            for part in gl.static_range(_steps(RANKS[i], BLOCK_K)):
                acc, slot, phase = _multiply(
                    acc, slot, phase, x_ring, w_ring, ready, NT, _depth(RANKS[i], part, BLOCK_K), STAGES
                )
                ahead = _load_next(
                    operands, ahead, m_tiles, n_tiles, steps, x_ring, w_ring, ready, GROUP, A0, A1, A2, NT, BLOCK_K,
                    BYTES, GROUP_M, BLOCK_M, BLOCK_N, STAGES,
                )  # fmt: skip
            if DROPOUT:
                acc = warpgroup_mma_wait(0, deps=(acc,))
                keep = _keep(words, i, m, n, M, N, BLOCK_M, BLOCK_N, ACC)
                acc = gl.where(keep, acc, 0.0 if i == 0 else c_tile.load(ACC).to(gl.float32))
        if DROPOUT:
            acc = acc * factor
        for step in range(main_steps):  # noqa: B007
            acc, slot, phase = _multiply(acc, slot, phase, x_ring, w_ring, ready, NT, BLOCK_K, STAGES)
            ahead = _load_next(
                operands, ahead, m_tiles, n_tiles, steps, x_ring, w_ring, ready, GROUP, A0, A1, A2, NT, BLOCK_K, BYTES,
                GROUP_M, BLOCK_M, BLOCK_N, STAGES,
            )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,))
        if BIAS:
            rn = n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, ACC))
            acc += gl.load(bias + rn, mask=rn < N, other=0.0).to(gl.float32)[None, :]
        tma.store_wait(0)
        c_tile.store(acc.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(c, [m, n], c_tile)
    tma.store_wait(0)


def launch(o: Operands, stages: int = 3) -> Tensor:
    """Runs the kernel on bfloat16 or float16 operands that `reasons` has nothing against."""
    m, n = o.shape
    out = o.s.new_empty(m, n)
    dtype = gl.bfloat16 if out.dtype == torch.bfloat16 else gl.float16

    def described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))

    w_block = [BLOCK_N, BLOCK_K] if o.nt else [BLOCK_K, BLOCK_N]
    c = described(out, [BLOCK_M, BLOCK_N])
    s = described(o.s, [BLOCK_M, BLOCK_K])
    xs = three([described(x, [BLOCK_M, BLOCK_K]) for x in o.xs])
    ws = three([described(w, w_block) for w in o.ws])
    bs = three([described(b, w_block) for b in o.bs])
    steps = three([triton.cdiv(x.shape[1], BLOCK_K) for x in o.xs])
    ranks = three(o.ranks)
    tiles = triton.cdiv(m, BLOCK_M) * triton.cdiv(n, BLOCK_N)
    hopper_matmul_kernel[(min(tiles, multiprocessors(out.device)),)](
        c, out if o.bias is None else o.bias, *xs, *ws, *steps, s, *bs, ranks[0], ranks[0] + ranks[1],
        out if o.words is None else o.words, o.factor, m, n,
        GROUP=len(o.xs), R0=ranks[0], R1=ranks[1], R2=ranks[2], NT=o.nt, BIAS=o.bias is not None,
        DROPOUT=o.words is not None, STAGES=stages, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP_M=GROUP_M,
        num_warps=8,
    )  # fmt: skip
    return out
