"""Device code that the Gluon kernels of packed_attention share: their work lists, masks and rings of shared memory.

As attention_common.py, in Gluon; tests/gpu/gluon_simulator.py runs this file too.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def described(x: Tensor, block: list[int]) -> TensorDescriptor:
    """x for the copy engine, in blocks that wgmma can read."""
    dtype = gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16
    return TensorDescriptor.from_tensor(x, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each for as many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def nth_item(i, programs):
    """The i-th item of this program: items come longest first, so every other round runs backwards."""
    place = i * programs + gl.program_id(0)
    if i % 2 == 1:
        place = (i + 1) * programs - (gl.program_id(0) + 1)
    return place


@gluon.jit
def load_item(tiles, item, items, KV_HEADS: gl.constexpr):
    """Row of the tile list of an item (tile, head): nothing is computed with it here, so that nobody waits for it."""
    if item >= items:  # past the end, to be fetched and not used
        item = 0
    tile = tiles + item // KV_HEADS * 8
    return (
        gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3), gl.load(tile + 4), gl.load(tile + 5),
        gl.load(tile + 6),
    )  # fmt: skip


@gluon.jit
def bounds(row, BLOCK: gl.constexpr):
    """First and last row; columns: start, start and end of those in whole blocks without a mask, end."""
    row_start, row_end, col_start, col_end, full_start, full_end = row
    full_end = full_start + (full_end - full_start) // BLOCK * BLOCK
    return row_start, row_end, col_start, full_start, full_end, col_end


@gluon.jit
def edge_blocks(col_start, full_start, full_end, col_end, BLOCK: gl.constexpr):
    """How many blocks the edges [col_start, full_start) and [full_end, col_end) have."""
    return gl.cdiv(full_start - col_start, BLOCK) + gl.cdiv(col_end - full_end, BLOCK)


@gluon.jit
def edge_columns(i, col_start, full_start, full_end, col_end, BLOCK: gl.constexpr):
    """The i-th of them: its first column, and where its edge ends."""
    left = gl.cdiv(full_start - col_start, BLOCK)
    col = col_start + i * BLOCK
    limit = full_start
    if i >= left:
        col = full_end + (i - left) * BLOCK
        limit = col_end
    return col, limit


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The next slot of a ring, and the parity of its barriers."""
    slot += 1
    if slot == STAGES:
        slot = 0
        phase ^= 1
    return slot, phase


@gluon.jit
def fetch(source, at, slot, ready, free, phase, BYTES: gl.constexpr):
    """Starts the copy of a block into a slot once its readers have left it."""
    mbarrier.wait(free, phase ^ 1)
    mbarrier.expect(ready, BYTES)
    tma.async_copy_global_to_shared(source, at, ready, slot)


@gluon.jit
def part(slot, source, ROWS: gl.constexpr, WIDTH: gl.constexpr, HEADS: gl.constexpr = 1):
    """The slot as it holds a block of the descriptor `source`, which may be lower than the slot."""
    return slot._reinterpret(source.dtype, [ROWS, HEADS, WIDTH], source.layout)


@gluon.jit
def clear_rows(tile, rows, ROWS: gl.constexpr, WIDTH: gl.constexpr):
    """Zeros from row `rows` on, where a tile holds other documents or none: zero times their values may be NaN.

    Both warpgroups do it, with the same result: neither has to wait for the other.
    """
    PART: gl.constexpr = min(ROWS, 32)  # few registers
    LAYOUT: gl.constexpr = row_layout(PART, WIDTH)
    row = gl.arange(0, PART, gl.SliceLayout(1, LAYOUT))
    for start in gl.static_range(0, ROWS, PART):
        part_of_tile = tile.slice(start, PART, dim=0)
        values = part_of_tile.load(LAYOUT)
        part_of_tile.store(gl.where((start + row < rows)[:, None], values, 0.0).to(tile.dtype))
    fence_async_shared()


@gluon.jit
def visible(query, key, limit, window, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr):
    """Whether a token sees a key of its own document; keys from `limit` on belong to none."""
    seen = key < limit
    if CAUSAL:
        seen = seen & (key <= query)
    elif WINDOWED:
        seen = seen & (key - query < window)
    if WINDOWED:
        seen = seen & (query - key < window)
    return seen


@gluon.jit
def capped(product, factor, cap):
    """Soft-capped logits in base 2. accurate_tanh of attention_common.py."""
    x = product * factor
    z = x * x
    tail = -0.333333304 + z * (0.13332924 + z * (-0.0538751382 + z * (0.021116214 + z * -0.00627638759)))
    return cap * gl.where(z < 0.36, x + x * z * tail, 1 - 2 / (gl.exp2(2.8853900817779268 * x) + 1))


@gluon.jit
def store_queries(
    acc, out, head, row_start, row_end, stride_ot, stride_oh, GROUP: gl.constexpr, PADDED: gl.constexpr,
    D: gl.constexpr, ROWS: gl.constexpr, WIDTH: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Stores packed rows, PADDED to a token of which GROUP are heads."""
    COPY: gl.constexpr = row_layout(ROWS, WIDTH)
    values = gl.convert_layout(acc.to(DTYPE), COPY)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, COPY))
    stored = (row_start + row // PADDED < row_end) & (row % PADDED < GROUP)
    out += gl.cast(row_start, gl.int64) * stride_ot + gl.cast(head * GROUP, gl.int64) * stride_oh
    offsets = row // PADDED * stride_ot + row % PADDED * stride_oh
    inside = stored[:, None] if D == WIDTH else stored[:, None] & (d < D)[None, :]
    gl.store(out + offsets[:, None] + d[None, :], values, mask=inside)


@constexpr_function
def row_layout(rows: int, columns: int) -> gl.DistributedLinearLayout:
    """Of four warps: 16 bytes of a row to a thread, 64 contiguous ones to four lanes.

    64 rows lie in the warps in which wgmma leaves them, so that a conversion stays inside a warp.
    """
    warps = [[rows // 4, 0], [rows // 2, 0]]
    columns_left = [[0, 1 << i] for i in range(5, columns.bit_length() - 1)]
    rows_left = [[1 << i, 0] for i in range(3, (rows // 4).bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], *columns_left, *rows_left], lanes, warps, [], [rows, columns]
    )
