"""Device code that the Triton kernels of packed_attention share: masks, packed rows, tiles."""

import triton
import triton.language as tl

# Arguments of the kernels whose value, 1 or a multiple of 16, is no reason to compile another variant.
UNSPECIALIZED = ("window", "tokens", "kv_heads")


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in float32; float32 inputs are multiplied as such, not rounded to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def accurate_tanh(x):
    """tanh; near zero, where 1 - 2 / (e^2x + 1) cancels, an odd polynomial (least squares, relative error 8e-8)."""
    z = x * x
    tail = -0.333333304 + z * (0.13332924 + z * (-0.0538751382 + z * (0.021116214 + z * -0.00627638759)))
    return tl.where(z < 0.36, x + x * z * tail, 1 - 2 / (tl.exp2(2.8853900817779268 * x) + 1))


@triton.jit
def visible(query, key, limit, window, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr):
    """Whether a token sees a key of its own document; keys from `limit` on belong to none."""
    seen = key < limit
    if CAUSAL:
        seen = seen & (key <= query)
    elif WINDOWED:
        seen = seen & (key - query < window)
    if WINDOWED:
        seen = seen & (query - key < window)
    return seen


@triton.jit
def row_offsets(local, stride_token, stride_head, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets [rows, BLOCK_D] of packed rows, counted from the first head of a token."""
    d = tl.arange(0, BLOCK_D)
    return (local // GROUP * stride_token + local % GROUP * stride_head)[:, None] + d[None, :]


@triton.jit
def load(pointers, rows, limit, MASK_ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads [rows, BLOCK_D]; what lies past column D, and with MASK_ROWS past row `limit`, is 0."""
    inside = tl.arange(0, BLOCK_D)[None, :] < D
    if MASK_ROWS:
        inside = (rows < limit)[:, None] if BLOCK_D == D else inside & (rows < limit)[:, None]
    if MASK_ROWS or BLOCK_D != D:
        return tl.load(pointers, mask=inside, other=0.0)
    return tl.load(pointers)


@triton.jit
def base2_logits(product, factor, cap, SOFTCAP: tl.constexpr):
    """Base-2 logits, and tanh of the capped ones, which the gradient needs."""
    if SOFTCAP:
        tanh = accurate_tanh(product * factor)
        return tanh * cap, tanh
    return product * factor, product


@triton.jit
def tile_bounds(tiles, kv_heads, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """The program's head; first and last row; columns: start, start and end of those without a mask, end.

    Columns are counted in units of UNIT to a token; those without a mask are whole blocks of BLOCK.
    """
    tile = tiles + tl.program_id(0) // kv_heads * 8
    full_start, full_end = tl.load(tile + 5) * UNIT, tl.load(tile + 6) * UNIT
    full_end = full_start + (full_end - full_start) // BLOCK * BLOCK
    return (
        tl.program_id(0) % kv_heads, tl.load(tile + 1), tl.load(tile + 2),
        tl.load(tile + 3) * UNIT, full_start, full_end, tl.load(tile + 4) * UNIT,
    )  # fmt: skip


@triton.jit
def edge_columns(i, col_start, full_start, full_end, col_end, BLOCK: tl.constexpr):
    """The i-th block of the edges [col_start, full_start) and [full_end, col_end): its first column, its edge's end."""
    left = tl.cdiv(full_start - col_start, BLOCK)
    col = tl.where(i < left, col_start + i * BLOCK, full_end + (i - left) * BLOCK)
    return col, tl.where(i < left, full_start, col_end)


@triton.jit
def edge_blocks(col_start, full_start, full_end, col_end, BLOCK: tl.constexpr, SOME: tl.constexpr = False):
    """How many blocks the edges have; with SOME at least one, which is masked as a whole where there are none.

    On sm_90 the last product of a loop is on its way when the loop ends, and is waited for behind it. Where a loop may
    be skipped, the way around it comes to that wait with sums that were set to zero by no product, and ptxas then makes
    every product of the kernel wait for the one before ("serialized"). The interior may be skipped: it begins with the
    sums of the edges.
    """
    blocks = tl.cdiv(full_start - col_start, BLOCK) + tl.cdiv(col_end - full_end, BLOCK)
    if SOME:
        blocks = tl.maximum(blocks, 1)
    return blocks


@triton.jit
def context_places(context, kv_heads):
    """Where the ranges of the program's tile begin and end in the list's context."""
    tile = context + tl.program_id(0) // kv_heads
    return tl.load(tile), tl.load(tile + 1)


@triton.jit
def context_range(place, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a range as those of `tile_bounds`, and its gap."""
    full_start, full_end = tl.load(place + 2) * UNIT, tl.load(place + 3) * UNIT
    full_end = full_start + (full_end - full_start) // BLOCK * BLOCK
    return tl.load(place) * UNIT, full_start, full_end, tl.load(place + 1) * UNIT, tl.load(place + 4)
