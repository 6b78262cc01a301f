"""What every loss over a linear head shares on the GPU: the rows that count, in chunks; their logits; the gradients.

Nothing waits for the GPU. The rows that count are listed by a stable partition on the device, their number stays there,
and programs past it do nothing. The matmuls need a number on the host: that of all rows, unless the caller knows a
bound for the rows that count (`counted_rows`).

Logits are float32 (cuBLAS accumulates and stores float32). bfloat16 logits would halve the traffic of the row kernel,
but move a log-probability by up to half a bfloat16 ulp of its logit, 0.03 at 16: thousands of times the tolerance.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..linear_head import cluster_blocks
from .workload import multiprocessors

MIN_CHUNK_ROWS = 2048  # below, the matmuls do not hide the traffic of the head and of its gradient, once a chunk
CHUNK_BYTES = 1 << 30  # of logits, unless MIN_CHUNK_ROWS need more

BLOCK = 1024  # of the small kernels
CUDA_BLOCKS_PER_SM = 2  # of csrc/cuda/logit_rows.cuh: one loads while the other computes


@triton.jit
def _bad_values(values_T, row, counted):
    value = tl.load(values_T + row, mask=counted, other=0.0)
    return counted & ((tl.abs(value) < float("inf")) == 0)  # NaN is not below infinity


@triton.jit
def _count_rows(
    targets_T, weights_T, sources_T, a_T, b_T, c_T, normalizer_ptr, rows_T, count_ptr, inverse_ptr, valid_8,
    tokens, vocab, num_sources, ignore_index, most,
    WEIGHTS: tl.constexpr, SOURCES: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    NORMALIZER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    count = 0
    total = tl.zeros([BLOCK], tl.float64)
    bad_targets = tl.zeros([BLOCK], tl.int32)
    bad_weights = tl.zeros([BLOCK], tl.int32)
    bad_sources = tl.zeros([BLOCK], tl.int32)
    bad_a = tl.zeros([BLOCK], tl.int32)
    bad_b = tl.zeros([BLOCK], tl.int32)
    bad_c = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tokens, BLOCK):
        row = start + tl.arange(0, BLOCK)
        target = tl.load(targets_T + row, mask=row < tokens, other=0)
        counted = (row < tokens) & (target != ignore_index)
        bad = counted & ((target < 0) | (target >= vocab))
        bad_targets |= bad.to(tl.int32)
        counted = counted & (bad == 0)
        if WEIGHTS:
            weight = tl.load(weights_T + row, mask=row < tokens, other=0.0)
            bad = ((weight >= 0) & (weight < float("inf"))) == 0
            bad_weights |= bad.to(tl.int32)
            counted = counted & (bad == 0) & (weight != 0)
            total += tl.where(counted, weight, 0.0).to(tl.float64)
        if SOURCES:
            source = tl.load(sources_T + row, mask=row < tokens, other=0)
            bad = counted & ((source < 0) | (source >= num_sources))
            bad_sources |= bad.to(tl.int32)
            counted = counted & (bad == 0)
        if A:
            bad_a |= _bad_values(a_T, row, counted).to(tl.int32)
        if B:
            bad_b |= _bad_values(b_T, row, counted).to(tl.int32)
        if C:
            bad_c |= _bad_values(c_T, row, counted).to(tl.int32)
        kept = counted.to(tl.int32)
        tl.store(rows_T + count + tl.cumsum(kept, 0) - 1, row, mask=counted)
        count += tl.sum(kept, axis=0)
    weight_sum = tl.sum(total, axis=0)
    if not WEIGHTS:
        weight_sum = tl.cast(count, tl.float64)
    valid_normalizer = 1
    if NORMALIZER:
        weight_sum = tl.load(normalizer_ptr).to(tl.float64)
        valid_normalizer = ((weight_sum >= 0) & (weight_sum < float("inf"))).to(tl.int32)
    tl.store(count_ptr, tl.minimum(count, most))
    # 1 / weight_sum by Newton's iteration: a float64 division is a call, which needs a stack.
    positive = tl.where(weight_sum > 0, weight_sum, 1.0)
    inverse = tl.div_rn(1.0, positive.to(tl.float32)).to(tl.float64)
    inverse = inverse * (2.0 - positive * inverse)
    tl.store(inverse_ptr, tl.where(weight_sum > 0, inverse * (2.0 - positive * inverse), 0.0))
    tl.store(valid_8, 1 - tl.max(bad_targets, axis=0))
    tl.store(valid_8 + 1, 1 - tl.max(bad_weights, axis=0))
    tl.store(valid_8 + 2, 1 - tl.max(bad_sources, axis=0))
    tl.store(valid_8 + 3, valid_normalizer)
    tl.store(valid_8 + 4, (count <= most).to(tl.int32))
    tl.store(valid_8 + 5, 1 - tl.max(bad_a, axis=0))
    tl.store(valid_8 + 6, 1 - tl.max(bad_b, axis=0))
    tl.store(valid_8 + 7, 1 - tl.max(bad_c, axis=0))


@triton.jit
def _gather(x_TD, rows_T, count_ptr, y_RD, first, d, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < d) & (first + row < tl.load(count_ptr))
    token = tl.load(rows_T + first + row, mask=first + row < tl.load(count_ptr), other=0).to(tl.int64)
    x = tl.load(x_TD + token * stride + column, mask=inside, other=0.0)
    tl.store(y_RD + row.to(tl.int64) * d + column, x, mask=column < d)


@triton.jit
def _scatter(x_RD, rows_T, count_ptr, y_TD, first, d, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if first + row < tl.load(count_ptr):
        token = tl.load(rows_T + first + row).to(tl.int64)
        x = tl.load(x_RD + row.to(tl.int64) * d + column, mask=column < d)
        tl.store(y_TD + token * d + column, x, mask=column < d)


class CountedRows:
    """The rows that count: listed on the device, in their order, their inputs checked there.

    Attributes:
        rows: int32 [tokens], the first `count` of them set.
        count: int32 [1].
        inverse: float64 [1], 1 / normalizer (the sum of the counted weights where none is given), 0 where that is 0.
        most: on the host, at least `count`: rows that the matmuls go over.
    """

    def __init__(
        self,
        targets: Tensor,
        vocab: int,
        ignore_index: int,
        counted_rows: int | None,
        *,
        weights: Tensor | None = None,
        sources: Tensor | None = None,
        num_sources: int = 1,
        normalizer: Tensor | None = None,
        finite: dict[str, Tensor | None] | None = None,
    ) -> None:
        """Launches one program; `finite`: up to three float32 vectors by name, finite in every row that counts."""
        tokens = targets.numel()
        self.most = tokens if counted_rows is None else min(counted_rows, tokens)
        self.rows = targets.new_empty(tokens, dtype=torch.int32)
        self.count = targets.new_empty(1, dtype=torch.int32)
        self.inverse = targets.new_empty(1, dtype=torch.float64)
        valid = targets.new_empty(8, dtype=torch.int32)
        if normalizer is not None:
            normalizer = normalizer.to(targets.device)
        values = [*(finite or {}).items(), ("", None), ("", None), ("", None)][:3]
        (_, a), (_, b), (_, c) = values
        _count_rows[(1,)](
            targets, weights, sources, a, b, c, normalizer, self.rows, self.count, self.inverse, valid,
            tokens, vocab, num_sources, ignore_index, self.most,
            WEIGHTS=weights is not None, SOURCES=sources is not None, A=a is not None, B=b is not None,
            C=c is not None, NORMALIZER=normalizer is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
        checks = (
            ("targets", targets, f"0 <= target < {vocab} or ignore_index in every row"),
            ("token_weights", weights, "a finite weight >= 0 in every row"),
            ("source_ids", sources, f"0 <= id < {num_sources} in every row that counts"),
            ("normalizer", normalizer, "a finite number >= 0"),
            ("counted_rows", counted_rows, f"at least the number of rows that count, got {counted_rows}"),
            *((name, value, "a finite number in every row that counts") for name, value in values),
        )
        for ok, (argument, given, expected) in zip(valid.unbind(), checks, strict=True):
            if given is not None:
                torch._assert_async(ok, f"{argument}: expected {expected}")  # fails in the stream; nothing waits


class LinearHeadChunks:
    """Chunks of the counted rows: logits, and what their gradient adds to dhidden and dhead.

    `for first, n in chunks:` z = chunks.logits(first, n); a kernel overwrites z by chunks.dlogits(n); then
    chunks.backward(first, n).
    """

    def __init__(
        self, hidden: Tensor, lm_head: Tensor, counted: CountedRows, need_dhidden: bool, need_dhead: bool
    ) -> None:
        self._hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
        self._lm_head = lm_head.contiguous()
        self._counted = counted
        self.vocab, width = lm_head.shape
        self.stride = triton.cdiv(self.vocab, 16) * 16  # of a row of logits; dlogits start at a multiple of 16 bytes
        self._rows = chunk_rows(counted.most, self.stride)
        self._logits = hidden.new_empty((self._rows, self.stride), dtype=torch.float32)
        self._gathered = hidden.new_empty((self._rows, width))
        self._need_dhidden, self._need_dhead = need_dhidden, need_dhead
        self._dhidden_chunk = hidden.new_empty((self._rows if need_dhidden else 0, width))
        self.dhidden = hidden.new_zeros(hidden.shape if need_dhidden else (0,))
        make = lm_head.new_empty if counted.most else lm_head.new_zeros
        self.dhead = make(lm_head.shape if need_dhead else (0,), dtype=torch.float32)  # the sum over chunks

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each chunk."""
        for first in range(0, self._counted.most, self._rows or 1):
            yield first, min(self._rows, self._counted.most - first)

    def logits(self, first: int, n: int) -> Tensor:
        """Float32 [n, vocab] with row stride `stride`; valid until the next call. Rows that do not count are 0."""
        width = self._hidden.shape[1]
        gathered, z = self._gathered[:n], self._logits[:n, : self.vocab]
        counted = self._counted
        _gather[(n, triton.cdiv(width, BLOCK))](
            self._hidden, counted.rows, counted.count, gathered, first, width, self._hidden.stride(0),
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        return matmul(gathered, self._lm_head.t(), z)

    def dlogits(self, n: int) -> Tensor:
        """[n, vocab] in the dtype of hidden, over the logits: their upper half, or all of it for float32."""
        if self._hidden.dtype == torch.float32:
            return self._logits[:n, : self.vocab]
        return self._logits.view(self._hidden.dtype)[:n, self.stride : self.stride + self.vocab]

    def scale_dhidden(self, factor: Tensor) -> None:
        """Multiplies every token's dhidden by its factor, float32 [tokens]."""
        torch.mul(self.dhidden, factor[:, None], out=self.dhidden)

    def backward(self, first: int, n: int) -> None:
        """Adds the chunk's part of the gradients."""
        dz, counted = self.dlogits(n), self._counted
        if self._need_dhidden:
            width = self._hidden.shape[1]
            chunk = matmul(dz, self._lm_head, self._dhidden_chunk[:n])
            _scatter[(n, triton.cdiv(width, BLOCK))](
                chunk, counted.rows, counted.count, self.dhidden, first, width, BLOCK=BLOCK, num_warps=4
            )
        if self._need_dhead:
            (add_matmul if first else matmul)(dz.t(), self._gathered[:n], self.dhead)


def clusters_of(vocab: int, device: torch.device) -> tuple[int, int]:
    """Blocks of csrc/cuda/logit_rows.cuh that share a row of logits; how many such clusters a GPU holds at a time."""
    blocks = cluster_blocks(vocab)
    return blocks, max(1, CUDA_BLOCKS_PER_SM * multiprocessors(device) // blocks)


def matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = a @ b, accumulated in float32 and rounded once to the dtype of out: that of a, or float32."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.float(), b.float(), out=out)  # the interpreter's tensors; torch has no out_dtype on the CPU


def add_matmul(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out += a @ b in float32."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out)
    if a.device.type == "cuda":
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.addmm(out, a.float(), b.float(), out=out)


def chunk_rows(rows: int, stride: int) -> int:
    """Rows of a chunk: about equal parts, as few as CHUNK_BYTES allows or MIN_CHUNK_ROWS asks for."""
    limit = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (4 * stride) // 128 * 128)
    equal = triton.cdiv(rows, max(1, triton.cdiv(rows, limit)))
    return min(rows, limit, triton.cdiv(equal, 128) * 128)
