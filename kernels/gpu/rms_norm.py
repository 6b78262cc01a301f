"""rms_norm in Triton: y = x * rstd * (weight + offset), rstd = 1 / sqrt(mean(x^2) + eps), float32 arithmetic.

A program holds one row, or several narrow ones, in registers: one read, one write. Longer rows are read twice.
dweight is summed in two stages in a fixed order: over the rows of a program, then over the programs; no atomics. The
programs that sum it are few, so each has the next two tiles on their way to shared memory while it works on one.

The same kernels serve add_rms_norm, where x + residual takes the place of x.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .workload import Workload, meta, multiprocessors

MAX_TILE = 16384  # elements of a row that a program keeps in registers
MAX_TILE_DWEIGHT = 8192  # with dweight beside them, more would spill


@triton.jit
def _forward(
    x_RD, residual_RD, w_D, y_RD, total_RD, rstd_R, rows, d, eps, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    at = row[:, None] * d + column[None, :]
    x = tl.load(x_RD + at, mask=inside, other=0.0).to(tl.float32)
    if residual_RD is not None:
        x += tl.load(residual_RD + at, mask=inside, other=0.0).to(tl.float32)
        total = x.to(total_RD.dtype.element_ty)
        tl.store(total_RD + at, total, mask=inside)
        x = total.to(tl.float32)
    w = tl.load(w_D + column, mask=column < d, other=0.0).to(tl.float32) + offset
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, axis=1) / d + eps))
    tl.store(rstd_R + row, rstd, mask=row < rows)
    tl.store(y_RD + at, (x * rstd[:, None] * w[None, :]).to(y_RD.dtype.element_ty), mask=inside)


@triton.jit
def _forward_long(x_RD, w_D, y_RD, rstd_R, d, eps, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_RD += row * d
    y_RD += row * d
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_RD + column, mask=column < d, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, axis=0) / d + eps))
    tl.store(rstd_R + row, rstd)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_RD + column, mask=column < d, other=0.0).to(tl.float32)
        w = tl.load(w_D + column, mask=column < d, other=0.0).to(tl.float32) + offset
        tl.store(y_RD + column, (x * rstd * w).to(y_RD.dtype.element_ty), mask=column < d)


# With g = dy * (weight + offset): dx = rstd * g - x * rstd^3 * mean(g * x); dweight = sum over rows of dy * x * rstd.


@triton.jit
def _backward(
    dy_RD, dtotal_RD, x_RD, w_D, rstd_R, dx_RD, partial_PD, rows, d, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    w = tl.load(w_D + column, mask=column < d, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK], tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < d)[None, :]
        at = row[:, None] * d + column[None, :]
        dy = tl.load(dy_RD + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_RD + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_R + row, mask=row < rows, other=0.0)
        g = dy * w[None, :]
        coefficient = rstd * rstd * rstd * tl.sum(g * x, axis=1) / d
        dx = rstd[:, None] * g - coefficient[:, None] * x
        if dtotal_RD is not None:
            dx += tl.load(dtotal_RD + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_RD + at, dx.to(dx_RD.dtype.element_ty), mask=inside)
        if partial_PD is not None:
            dw += tl.sum(dy * x * rstd[:, None], axis=0)
    if partial_PD is not None:
        tl.store(partial_PD + tl.program_id(0).to(tl.int64) * d + column, dw, mask=column < d)


@triton.jit
def _backward_long(dy_RD, x_RD, w_D, rstd_R, dx_RD, d, offset, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    dy_RD += row * d
    x_RD += row * d
    dx_RD += row * d
    rstd = tl.load(rstd_R + row)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_RD + column, mask=column < d, other=0.0).to(tl.float32)
        x = tl.load(x_RD + column, mask=column < d, other=0.0).to(tl.float32)
        w = tl.load(w_D + column, mask=column < d, other=0.0).to(tl.float32) + offset
        products += dy * w * x
    coefficient = rstd * rstd * rstd * tl.sum(products, axis=0) / d
    for start in range(0, d, BLOCK):
        column = start + tl.arange(0, BLOCK)
        dy = tl.load(dy_RD + column, mask=column < d, other=0.0).to(tl.float32)
        x = tl.load(x_RD + column, mask=column < d, other=0.0).to(tl.float32)
        w = tl.load(w_D + column, mask=column < d, other=0.0).to(tl.float32) + offset
        tl.store(dx_RD + column, (rstd * dy * w - coefficient * x).to(dx_RD.dtype.element_ty), mask=column < d)


@triton.jit
def _dweight_long(dy_RD, x_RD, rstd_R, partial_PD, rows, d, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dw = tl.zeros([BLOCK], tl.float32)
    for row in range(tl.program_id(1), rows, tl.num_programs(1)):
        at = tl.cast(row, tl.int64) * d + column
        dy = tl.load(dy_RD + at, mask=column < d, other=0.0).to(tl.float32)
        x = tl.load(x_RD + at, mask=column < d, other=0.0).to(tl.float32)
        dw += dy * x * tl.load(rstd_R + row)
    tl.store(partial_PD + tl.program_id(1).to(tl.int64) * d + column, dw, mask=column < d)


@triton.jit
def _sum_partials(partial_PD, out_D, partials, d, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, partials, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < partials)[:, None] & (column < d)[None, :]
        sums += tl.load(partial_PD + row.to(tl.int64)[:, None] * d + column[None, :], mask=inside, other=0.0)
    tl.store(out_D + column, tl.sum(sums, axis=0).to(out_D.dtype.element_ty), mask=column < d)


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel; results as the op's schema has them."""
    y, _, rstd = launch_forward(x, None, weight, eps, weight_offset)
    return y, rstd


def rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, weight_offset: float, need_dweight: bool
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernels; results as the op's schema has them."""
    return launch_backward(dy, None, x, weight, rstd, weight_offset, need_dweight)


def launch_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The norm of x, or of x + residual: y, the normed tensor (x itself without a residual), rstd."""
    x, weight = x.contiguous(), weight.contiguous()
    d = weight.numel()
    rows = x.numel() // d if d else 0
    if residual is not None and (rows == 0 or d > MAX_TILE):
        x, residual = x + residual, None
    y, rstd = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    total = None if residual is None else torch.empty_like(x)
    if rows == 0:
        return y, x, rstd
    if d > MAX_TILE:
        _forward_long[(rows,)](x, weight, y, rstd, d, eps, weight_offset, BLOCK=4096, num_warps=8)
    else:
        block = triton.next_power_of_2(d)
        tile_rows = max(1, 2048 // block)
        _forward[(triton.cdiv(rows, tile_rows),)](
            x, None if residual is None else residual.contiguous(), weight, y, total, rstd, rows, d, eps, weight_offset,
            ROWS=tile_rows, BLOCK=block, num_warps=_warps(block * tile_rows, 32),
        )  # fmt: skip
    return y, x if total is None else total, rstd


def launch_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    weight_offset: float,
    need_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of x, the normed tensor, plus dtotal; gradient of the weight, empty where it is not needed."""
    dy, x, weight = dy.contiguous(), x.contiguous(), weight.contiguous()
    d, rows = weight.numel(), rstd.numel()
    dx, dweight = torch.empty_like(x), weight.new_empty(d if need_dweight else 0)
    if rows == 0:
        return dx, dweight.zero_()
    partials = None
    if d > (MAX_TILE_DWEIGHT if need_dweight else MAX_TILE):
        _backward_long[(rows,)](dy, x, weight, rstd, dx, d, weight_offset, BLOCK=4096, num_warps=8)
        if need_dweight:
            columns = triton.cdiv(d, 1024)
            partials = _partials(x, min(rows, triton.cdiv(8 * multiprocessors(x.device), columns)), d)
            _dweight_long[(columns, partials.shape[0])](dy, x, rstd, partials, rows, d, BLOCK=1024, num_warps=4)
        if dtotal is not None:
            dx += dtotal
    else:
        block = triton.next_power_of_2(d)
        tile_rows = max(1, (4096 if need_dweight else 2048) // block)
        warps = _warps(block * tile_rows, 16 if need_dweight else 32)
        programs = triton.cdiv(rows, tile_rows)
        if need_dweight:
            # As many as the multiprocessors hold: more would only write more partial sums.
            programs = min(programs, (2 if warps <= 8 else 1) * multiprocessors(x.device))
            partials = _partials(x, programs, d)
        _backward[(programs,)](
            dy, None if dtotal is None else dtotal.contiguous(), x, weight, rstd, dx, partials, rows, d, weight_offset,
            ROWS=tile_rows, BLOCK=block, STAGES=3 if need_dweight else 1, num_warps=warps,
        )  # fmt: skip
    if partials is not None:
        block = 32 if d <= 4096 else 128
        _sum_partials[(triton.cdiv(d, block),)](
            partials, dweight, partials.shape[0], d, ROWS=32, BLOCK=block, num_warps=4
        )
    return dx, dweight


def _warps(elements: int, per_thread: int) -> int:
    return max(2, min(16, elements // (32 * per_thread)))


def _partials(x: Tensor, programs: int, d: int) -> Tensor:
    return x.new_empty((programs, d), dtype=torch.float32)


def workloads() -> list[Workload]:
    """Rows of the width of a head, of SmolLM2-135M, Llama-3-8B, a 70B model, a 405B model, and one longer still."""
    listed = []
    for d, tokens in ((128, 8192 * 32), (576, 8192), (4096, 8192), (8192, 8192), (16384, 2048), (20480, 2048)):
        x, w, rstd = meta(tokens, d), meta(d), meta(tokens, dtype=torch.float32)
        call = partial(rms_norm, x, w, 1e-6, 0.0)
        listed.append(Workload(f"rms_norm: forward {tokens} x {d}", call, 4 * tokens * d))
        for need, what in ((False, "backward"), (True, "backward with dweight")):
            call = partial(rms_norm_backward, x, x, w, rstd, 0.0, need)
            listed.append(Workload(f"rms_norm: {what} {tokens} x {d}", call, 6 * tokens * d))
    return listed
