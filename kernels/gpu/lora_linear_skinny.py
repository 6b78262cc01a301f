"""lora_linear on a GPU, the skinny half: S, dS with dB, and dA, each in one pass over x or dY; and dropout's bits.

Every kernel takes up to three projections of one x. M tokens, K in, N out, r rank (R: padded to a power of two of at
least 16); `s` and `ds` are [M, sum of ranks], one column block per projection; adapters have the dtype of x. A sum that
several programs share goes through float32 parts and a second, ordered pass: no atomics, so that a result repeats bit
for bit.

Dropout is one bit an element: `words` [projections, M, ceil(K / 32)], bit b of word w of a row says whether element
32 w + b is kept. Ten rounds of Philox take longer than reading x: the bits are made by a kernel of their own and read
by every pass that drops something.
"""

import triton
import triton.language as tl


@triton.jit
def _pick(i, v0, v1, v2):
    """Argument i of three, for an index known at run time only."""
    return tl.where(i == 0, v0, tl.where(i == 1, v1, v2))


@triton.jit
def _philox(block, stream, seed):
    """Philox4x32-10 of counter (block, stream, 0). One 64-bit product gives both halves; tl.philox multiplies twice."""
    c0 = (block & 0xFFFFFFFF).to(tl.uint32)
    c1 = (block >> 32).to(tl.uint32)
    c2, c3 = c0 * 0 + stream.to(tl.uint32), c0 * 0
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p2 >> 32).to(tl.uint32) ^ c1 ^ key0
        c1 = (p2 & 0xFFFFFFFF).to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key1
        c3 = (p0 & 0xFFFFFFFF).to(tl.uint32)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_bits_kernel(
    words, seed_pointer, M, K, lowest_kept,
    BLOCK_M: tl.constexpr, WORDS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Bits of BLOCK_M rows and WORDS words of the projection program_id(2), whose index is the stream.

    Element e = row * K + column takes word e % 4 of Philox4x32-10 with key `seed` and counter (e // 4, stream, 0).
    """
    rm = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    rw = (tl.program_id(1) * WORDS + tl.arange(0, WORDS))[None, :]
    stream = tl.program_id(2)
    seed = tl.load(seed_pointer)
    kept = (tl.full((1, 1, 1), 0, tl.int32) + lowest_kept).to(tl.uint32, bitcast=True)
    first = rm.to(tl.int64) * K + rw.to(tl.int64) * 32
    if ALIGNED:  # K % 4 == 0: a word of bits begins with word 0 of a counter
        c = tl.arange(0, 8)[None, None, :]
        w0, w1, w2, w3 = _philox((first >> 2)[:, :, None] + c, stream, seed)
        four = (w0 >= kept).to(tl.int32) | (w1 >= kept).to(tl.int32) << 1
        four |= (w2 >= kept).to(tl.int32) << 2 | (w3 >= kept).to(tl.int32) << 3
        packed = tl.sum(four << (4 * c), axis=2)
    else:
        b = tl.arange(0, 32)[None, None, :]
        element = first[:, :, None] + b
        w0, w1, w2, w3 = _philox(element >> 2, stream, seed)
        which = element & 3
        chosen = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        packed = tl.sum((chosen >= kept).to(tl.int32) << b, axis=2)
    row_words = (K + 31) // 32
    target = words + (stream * M + rm).to(tl.int64) * row_words + rw
    tl.store(target, packed, mask=(rm < M) & (rw < row_words))


@triton.jit
def unpacked(words, ROWS: tl.constexpr, WORDS: tl.constexpr):
    """[ROWS, WORDS] dropout bits as [ROWS, 32 * WORDS] booleans."""
    bits = ((words[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1) != 0
    return tl.reshape(bits, (ROWS, 32 * WORDS))


@triton.jit
def _dropped(
    x_MK, words, stream, rm, begin, M, K,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """The tile of x at rows rm and column `begin`, with zeros where projection `stream` drops an element."""
    if DROPOUT:
        WORDS: tl.constexpr = BLOCK_K // 32
        row_words = (K + 31) // 32
        rw = begin // 32 + tl.arange(0, WORDS)
        at = words + (stream * M + rm[:, None]).to(tl.int64) * row_words + rw[None, :]
        packed = tl.load(at, mask=(rm[:, None] < M) & (rw[None, :] < row_words), other=0)
        x_MK = tl.where(unpacked(packed, BLOCK_M, WORDS), x_MK, 0.0)
    return x_MK


@triton.jit
def _columns(a, rank, K, rk, end, R: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A^T [columns rk, R] of A [rank, K], or of its transpose in memory; zero beyond its rank and its end."""
    rr = tl.arange(0, R)[None, :]
    rk = rk[:, None]
    at = a + (rk * rank + rr if TRANSPOSED else rr * K + rk)
    return tl.load(at, mask=(rr < rank) & (rk < end), other=0.0)


@triton.jit
def shrink_kernel(
    x, a0, a1, a2, s, words, M, K, r0, r1, r2, scale0, scale1, scale2, columns, stream, k_per_split,
    GROUP: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """s[split, :, columns of i] = scale_i * dropout_i(x) A_i^T over the split's part of K.

    With TRANSPOSED, A_i lies in memory as [K, r_i]: x = dY and A = B^T give dS.
    """
    rm = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = rm[:, None] < M
    split = tl.program_id(1)
    k_end = tl.minimum((split + 1) * k_per_split, K)
    rows = x + rm[:, None].to(tl.int64) * K
    acc0 = tl.zeros((BLOCK_M, R0), tl.float32)
    acc1 = tl.zeros((BLOCK_M, R1), tl.float32)
    acc2 = tl.zeros((BLOCK_M, R2), tl.float32)
    for k in range(split * k_per_split, k_end, BLOCK_K):
        rk = k + tl.arange(0, BLOCK_K)
        x_MK = tl.load(rows + rk[None, :], mask=live & (rk[None, :] < k_end), other=0.0)
        x0_MK = _dropped(x_MK, words, stream, rm, k, M, K, BLOCK_M, BLOCK_K, DROPOUT)
        acc0 = tl.dot(x0_MK, _columns(a0, r0, K, rk, k_end, R0, TRANSPOSED), acc0, input_precision="ieee")
        if GROUP > 1:
            x1_MK = _dropped(x_MK, words, stream + 1, rm, k, M, K, BLOCK_M, BLOCK_K, DROPOUT)
            acc1 = tl.dot(x1_MK, _columns(a1, r1, K, rk, k_end, R1, TRANSPOSED), acc1, input_precision="ieee")
        if GROUP > 2:
            x2_MK = _dropped(x_MK, words, stream + 2, rm, k, M, K, BLOCK_M, BLOCK_K, DROPOUT)
            acc2 = tl.dot(x2_MK, _columns(a2, r2, K, rk, k_end, R2, TRANSPOSED), acc2, input_precision="ieee")

    out = s + (split * M + rm[:, None]).to(tl.int64) * columns
    j0 = tl.arange(0, R0)[None, :]
    tl.store(out + j0, (acc0 * scale0).to(s.dtype.element_ty), mask=live & (j0 < r0))
    if GROUP > 1:
        j1 = tl.arange(0, R1)[None, :]
        tl.store(out + r0 + j1, (acc1 * scale1).to(s.dtype.element_ty), mask=live & (j1 < r1))
    if GROUP > 2:
        j2 = tl.arange(0, R2)[None, :]
        tl.store(out + r0 + r1 + j2, (acc2 * scale2).to(s.dtype.element_ty), mask=live & (j2 < r2))


@triton.jit
def expand_backward_kernel(
    dy0, dy1, dy2, b0, b1, b2, s, ds_parts, db_parts, M, n0, n1, n2, r0, r1, r2, scale0, scale1, scale2, columns,
    rows_per_panel,
    R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One panel of dY, rows_per_panel x BLOCK_N: its parts of dS_i = scale_i * dY_i B_i and of dB_i = dY_i^T S_i.

    ds_parts: per projection [ceil(N_i / BLOCK_N), M, r_i]; db_parts: per projection [row panels, N_i, r_i].
    """
    panel = tl.program_id(0)
    row_panel = tl.program_id(1)
    c0 = tl.cdiv(n0, BLOCK_N)
    c1 = c0 + tl.cdiv(n1, BLOCK_N)
    i = (panel >= c0).to(tl.int32) + (panel >= c1).to(tl.int32)
    dy = _pick(i, dy0, dy1, dy2)
    b = _pick(i, b0, b1, b2)
    N = _pick(i, n0, n1, n2)
    rank = _pick(i, r0, r1, r2)
    scale = _pick(i, scale0, scale1, scale2)
    column = panel - _pick(i, 0, c0, c1)
    before = _pick(i, 0, r0, r0 + r1)  # columns of s that belong to earlier projections
    m64 = (panel * 0 + M).to(tl.int64)
    ds_part = ds_parts + m64 * (_pick(i, 0, c0 * r0, c0 * r0 + (c1 - c0) * r1) + column * rank)
    panels64 = tl.num_programs(1).to(tl.int64)
    db_part = db_parts + panels64 * _pick(i, 0, n0 * r0, n0 * r0 + n1 * r1) + row_panel.to(tl.int64) * N * rank

    rn = column * BLOCK_N + tl.arange(0, BLOCK_N)
    rr = tl.arange(0, R)
    n_mask = rn < N
    r_mask = rr[None, :] < rank
    b_NR = tl.load(b + rn[:, None] * rank + rr[None, :], mask=n_mask[:, None] & r_mask, other=0.0)
    b_NR = b_NR.to(dy.dtype.element_ty)
    db_NR = tl.zeros((BLOCK_N, R), tl.float32)
    end = tl.minimum((row_panel + 1) * rows_per_panel, M)
    for begin in range(row_panel * rows_per_panel, end, BLOCK_M):
        rm = (begin + tl.arange(0, BLOCK_M))[:, None]
        live = rm < end
        dy_MN = tl.load(dy + rm.to(tl.int64) * N + rn[None, :], mask=live & n_mask[None, :], other=0.0)
        s_MR = tl.load(s + rm.to(tl.int64) * columns + before + rr[None, :], mask=live & r_mask, other=0.0)
        ds_MR = tl.dot(dy_MN, b_NR, input_precision="ieee")
        tl.store(ds_part + rm.to(tl.int64) * rank + rr[None, :], ds_MR * scale, mask=live & r_mask)
        db_NR = tl.dot(tl.trans(dy_MN), s_MR, db_NR, input_precision="ieee")
    tl.store(db_part + rn[:, None] * rank + rr[None, :], db_NR, mask=n_mask[:, None] & r_mask)


@triton.jit
def _transposed_rows(ds, rank, columns, rm, end, R: tl.constexpr):
    """dS^T [R, rows rm], zero beyond its rank and its end."""
    rr = tl.arange(0, R)[None, :]
    at = ds + rm[:, None].to(tl.int64) * columns + rr
    return tl.trans(tl.load(at, mask=(rm[:, None] < end) & (rr < rank), other=0.0))


@triton.jit
def shrink_backward_kernel(
    ds, x, words, parts, M, K, r0, r1, r2, factor, columns, stream, rows_per_panel,
    GROUP: tl.constexpr, R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """Parts of dA_i = factor * dS_i^T dropout_i(x); parts: per projection [row panels, r_i, K]."""
    k = tl.program_id(0) * BLOCK_K
    row_panel = tl.program_id(1)
    rk = k + tl.arange(0, BLOCK_K)
    k_mask = rk[None, :] < K
    acc0 = tl.zeros((R0, BLOCK_K), tl.float32)
    acc1 = tl.zeros((R1, BLOCK_K), tl.float32)
    acc2 = tl.zeros((R2, BLOCK_K), tl.float32)
    end = tl.minimum((row_panel + 1) * rows_per_panel, M)
    for begin in range(row_panel * rows_per_panel, end, BLOCK_M):
        rm = begin + tl.arange(0, BLOCK_M)
        x_MK = tl.load(x + rm[:, None].to(tl.int64) * K + rk[None, :], mask=(rm[:, None] < end) & k_mask, other=0.0)
        x0_MK = _dropped(x_MK, words, stream, rm, k, M, K, BLOCK_M, BLOCK_K, DROPOUT)
        acc0 = tl.dot(_transposed_rows(ds, r0, columns, rm, end, R0), x0_MK, acc0, input_precision="ieee")
        if GROUP > 1:
            x1_MK = _dropped(x_MK, words, stream + 1, rm, k, M, K, BLOCK_M, BLOCK_K, DROPOUT)
            acc1 = tl.dot(_transposed_rows(ds + r0, r1, columns, rm, end, R1), x1_MK, acc1, input_precision="ieee")
        if GROUP > 2:
            x2_MK = _dropped(x_MK, words, stream + 2, rm, k, M, K, BLOCK_M, BLOCK_K, DROPOUT)
            ds2 = ds + r0 + r1
            acc2 = tl.dot(_transposed_rows(ds2, r2, columns, rm, end, R2), x2_MK, acc2, input_precision="ieee")
    panels = tl.num_programs(1)
    part = parts + row_panel.to(tl.int64) * K * r0 + rk[None, :]
    j0 = tl.arange(0, R0)[:, None]
    tl.store(part + j0.to(tl.int64) * K, acc0 * factor, mask=(j0 < r0) & k_mask)
    if GROUP > 1:
        part = parts + (panels * r0 + row_panel * r1).to(tl.int64) * K + rk[None, :]
        j1 = tl.arange(0, R1)[:, None]
        tl.store(part + j1.to(tl.int64) * K, acc1 * factor, mask=(j1 < r1) & k_mask)
    if GROUP > 2:
        part = parts + (panels * (r0 + r1) + row_panel * r2).to(tl.int64) * K + rk[None, :]
        j2 = tl.arange(0, R2)[:, None]
        tl.store(part + j2.to(tl.int64) * K, acc2 * factor, mask=(j2 < r2) & k_mask)


@triton.jit
def cast_kernel(x0, x1, x2, out0, out1, out2, size0, size1, size2, BLOCK: tl.constexpr):
    """out_i = x_i in the dtype of out_i."""
    i = tl.program_id(1)
    out = _pick(i, out0, out1, out2)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < _pick(i, size0, size1, size2)
    value = tl.load(_pick(i, x0, x1, x2) + element, mask=mask, other=0.0)
    tl.store(out + element, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def sum_parts_kernel(
    parts, out0, out1, out2, offset0, offset1, offset2, count0, count1, count2, size0, size1, size2, columns0, columns1,
    columns2, row_stride0, row_stride1, row_stride2, column_stride0, column_stride1, column_stride2,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = sum of count_i parts of size_i elements each, in order, in float32; out_i is strided."""
    i = tl.program_id(1)
    out = _pick(i, out0, out1, out2)
    size = _pick(i, size0, size1, size2)
    columns = _pick(i, columns0, columns1, columns2)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    part = parts + _pick(i, offset0, offset1, offset2) + element
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(_pick(i, count0, count1, count2)):
        total += tl.load(part, mask=mask, other=0.0)
        part += size
    out += (element // columns) * _pick(i, row_stride0, row_stride1, row_stride2)
    out += (element % columns) * _pick(i, column_stride0, column_stride1, column_stride2)
    tl.store(out, total.to(out.dtype.element_ty), mask=mask)
