"""Device code that the Gluon kernels of packed_attention share: their work lists, masks and rings of shared memory.

As attention_common.py, in Gluon; tests/gpu/gluon_simulator.py runs this file too.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers, each for as many arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def wide(count):
    """As 64 bits. Unsigned: the sign of an argument would be computed before the partitions, and kept for all."""
    return gl.cast(gl.cast(count, gl.uint32), gl.int64)


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
def load_places(context, item, items, KV_HEADS: gl.constexpr, SHARED: gl.constexpr):
    """Where the ranges of columns of an item's tile begin and end in the context; without one there is one range.

    The first range is that of the item's row, so nobody waits for it; `load_range` has the others.
    """
    place, last = 0, 5
    if SHARED:
        if item >= items:
            item = 0
        place, last = gl.load(context + item // KV_HEADS), gl.load(context + item // KV_HEADS + 1)
    return place, last


@gluon.jit
def load_range(context, at, last):
    """The range after that at `at`, to be used when that is done; the last one has itself behind it."""
    at = context + gl.minimum(at + 5, last - 5)
    return gl.load(at), gl.load(at + 2), gl.load(at + 3), gl.load(at + 1), gl.load(at + 4)


@gluon.jit
def range_bounds(found, BLOCK: gl.constexpr):
    """Columns of a range as those of `bounds`, and its gap: a key is visible to query i if it is to `i - gap`."""
    col_start, full_start, full_end, col_end, gap = found
    return col_start, full_start, full_start + (full_end - full_start) // BLOCK * BLOCK, col_end, gap


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
def in_order(barrier, phase):
    """A wait that no result depends on: ptxas takes the wait for a product up past exponentials, but not past a branch.

    That of a barrier which is long complete is one, and has to be passed every time.
    """
    mbarrier.wait(barrier, phase)


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
def start_product(a_tile, b_tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr, LAYOUT: gl.constexpr):
    """a b^T."""
    zeros = gl.zeros([ROWS, COLUMNS], gl.float32, LAYOUT)
    return warpgroup_mma(a_tile, b_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


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
def accurate_tanh(x):
    """As that of attention_common.py."""
    z = x * x
    tail = -0.333333304 + z * (0.13332924 + z * (-0.0538751382 + z * (0.021116214 + z * -0.00627638759)))
    return gl.where(z < 0.36, x + x * z * tail, 1 - 2 / (gl.exp2(2.8853900817779268 * x) + 1))


@gluon.jit
def base2_logits(product, factor, cap, SOFTCAP: gl.constexpr):
    """Base-2 logits, and tanh of the capped ones, which the gradient needs."""
    if SOFTCAP:
        tanh = accurate_tanh(product * factor)
        return tanh * cap, tanh
    return product * factor, product


@gluon.jit
def softmax(
    s, row_max, row_sum, query, key, limit, factor, cap, window, CAUSAL: gl.constexpr, WINDOWED: gl.constexpr,
    SOFTCAP: gl.constexpr, EDGE: gl.constexpr, LAYOUT: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """Takes a block of products into the running softmax: P, what to keep of the sums so far, new maximum and sum."""
    COLUMN: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    row_max = gl.convert_layout(row_max, COLUMN, assert_trivial=True)
    row_sum = gl.convert_layout(row_sum, COLUMN, assert_trivial=True)
    if EDGE or SOFTCAP:
        logits, _ = base2_logits(s, factor, cap, SOFTCAP)
        if EDGE:
            query = gl.convert_layout(query, COLUMN, assert_trivial=True)
            seen = visible(query[:, None], key[None, :], limit, window, CAUSAL, WINDOWED)
            logits = gl.where(seen, logits, float("-inf"))
        new_max = gl.maximum(row_max, gl.max(logits, 1))
        # A row of a window may have met no key yet.
        base = gl.where(new_max == float("-inf"), 0.0, new_max) if EDGE else new_max
        p = gl.exp2(logits - base[:, None])
    else:
        # factor >= 0, so that the scaled maximum is the maximum of the scaled: one multiply-add for each element.
        new_max = gl.maximum(row_max, gl.max(s, 1) * factor)
        base = new_max
        p = gl.exp2(s * factor - base[:, None])
    keep = gl.exp2(row_max - base)
    row_sum = row_sum * keep + gl.sum(p, 1)
    return (
        p, gl.convert_layout(keep, ROW, assert_trivial=True), gl.convert_layout(new_max, ROW, assert_trivial=True),
        gl.convert_layout(row_sum, ROW, assert_trivial=True),
    )  # fmt: skip


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
    out += wide(row_start) * wide(stride_ot) + wide(head * GROUP) * wide(stride_oh)
    offsets = row // PADDED * stride_ot + row % PADDED * stride_oh
    inside = stored[:, None] if D == WIDTH else stored[:, None] & (d < D)[None, :]
    gl.store(out + offsets[:, None] + d[None, :], values, mask=inside)


@gluon.jit
def store_keys(
    acc, out, head, row_start, row_end, KV_HEADS: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
    WIDTH: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Stores the rows of keys of one head, contiguous."""
    COPY: gl.constexpr = row_layout(ROWS, WIDTH)
    values = gl.convert_layout(acc.to(DTYPE), COPY)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, COPY))
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, COPY))
    out += (wide(row_start) * KV_HEADS + head) * D
    stored = (row_start + row < row_end)[:, None]
    inside = stored if D == WIDTH else stored & (d < D)[None, :]
    gl.store(out + row[:, None] * (KV_HEADS * D) + d[None, :], values, mask=inside)


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
