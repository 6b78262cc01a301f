"""weighted_linear_cross_entropy on GPUs: loss, statistics per source, both gradients in one pass over chunks of rows.

A chunk of logits from cuBLAS; one program a row reduces it and writes the row's gradient over it, since its weight and
the normalizer are known before the loss; then the two matmuls of the gradient. The backward of autograd only scales.
Sums over rows are made per block of rows, then over the blocks, in float64 and in a fixed order: no atomics.

The rows are worked on in Triton, or by a CUDA kernel of csrc/cuda that keeps a row in the shared memory of a cluster of
blocks and so reads it once; everything around them is the same.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_head import CountedRows, LinearHeadChunks, clusters_of
from .softmax_row import clear_row, row_sums, tile_of, write_gradient
from .workload import Workload, meta

STATISTICS_ROWS = 256  # of a block
MAX_SOURCES = 16  # of a program


@triton.jit
def _rows(
    z_RV, dz_RV, rows_T, count_ptr, targets_T, weights_T, inverse_ptr, nll_T, token_loss_T, correct_T,
    first, vocab, stride, dz_stride, softcap, z_loss, smoothing,
    WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr,
    UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row: nll, loss with smoothing and z-loss, whether the target is predicted; its gradient over its logits."""
    row = first + tl.program_id(0)
    z_V = z_RV + tl.program_id(0).to(tl.int64) * stride
    dz_V = dz_RV + tl.program_id(0).to(tl.int64) * dz_stride
    if row < tl.load(count_ptr):
        token = tl.load(rows_T + row)
        target = tl.load(targets_T + token).to(tl.int32)
        row_max, log_sum, logprob, is_prediction, sum, _ = row_sums(
            z_V, vocab, target, softcap, 1.0, SOFTCAP, False, SMOOTHING, False, UNROLL, LANES
        )
        log_z = row_max.to(tl.float64) + log_sum
        token_loss = z_loss * log_z * log_z - logprob
        if SMOOTHING:
            token_loss += smoothing * ((log_z - tl.div_rn(sum, tl.cast(vocab, tl.float32)).to(tl.float64)) + logprob)
        tl.store(nll_T + row, -logprob.to(tl.float32))
        tl.store(token_loss_T + row, token_loss.to(tl.float32))
        tl.store(correct_T + row, is_prediction.to(tl.int32))
        if GRADIENT:
            scale = tl.load(inverse_ptr).to(tl.float32)
            if WEIGHTS:
                scale *= tl.load(weights_T + token)
            # d(token loss)/dz = p * (1 + 2 * z_loss * Z) - smoothing / vocab - (1 - smoothing) * onehot
            write_gradient(
                z_V, dz_V, vocab, target, row_max, log_sum.to(tl.float32), scale * (smoothing - 1.0),
                scale * (1.0 + 2.0 * z_loss * log_z.to(tl.float32)), 0.0, -scale * smoothing / vocab, softcap, 1.0,
                SOFTCAP, False, False, UNROLL, LANES,
            )  # fmt: skip
    elif GRADIENT:
        clear_row(dz_V, vocab, UNROLL * LANES)


@triton.jit
def _block_statistics(
    rows_T, count_ptr, weights_T, sources_T, nll_T, token_loss_T, correct_T, partial_BS5, num_sources,
    WEIGHTS: tl.constexpr, SOURCES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per block of rows and source: weight * loss, weight * nll, weight, tokens, correct tokens."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    source = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(count_ptr)
    token = tl.load(rows_T + row, mask=inside, other=0)
    weight = inside.to(tl.float64)
    if WEIGHTS:
        weight = tl.load(weights_T + token, mask=inside, other=0.0).to(tl.float64)
    member = inside[None, :] & (source[:, None] == 0)
    if SOURCES:
        member = inside[None, :] & (source[:, None] == tl.load(sources_T + token, mask=inside, other=-1)[None, :])
    token_loss = weight * tl.load(token_loss_T + row, mask=inside, other=0.0).to(tl.float64)
    nll = weight * tl.load(nll_T + row, mask=inside, other=0.0).to(tl.float64)
    correct = tl.load(correct_T + row, mask=inside, other=0).to(tl.float64)
    at = (tl.program_id(0) * num_sources + source) * 5
    kept = source < num_sources
    tl.store(partial_BS5 + at, tl.sum(tl.where(member, token_loss[None, :], 0.0), axis=1), mask=kept)
    tl.store(partial_BS5 + at + 1, tl.sum(tl.where(member, nll[None, :], 0.0), axis=1), mask=kept)
    tl.store(partial_BS5 + at + 2, tl.sum(tl.where(member, weight[None, :], 0.0), axis=1), mask=kept)
    tl.store(partial_BS5 + at + 3, tl.sum(member.to(tl.float64), axis=1), mask=kept)
    tl.store(partial_BS5 + at + 4, tl.sum(tl.where(member, correct[None, :], 0.0), axis=1), mask=kept)


@triton.jit
def _statistics(
    partial_BS5, inverse_ptr, loss_ptr, nll_S, weight_S, count_S, correct_S, blocks, num_sources, BLOCK: tl.constexpr
):
    """Sums of the blocks, in their order."""
    loss = tl.zeros([BLOCK], tl.float64)
    for start in range(0, num_sources, BLOCK):
        source = start + tl.arange(0, BLOCK)
        kept = source < num_sources
        nll = tl.zeros([BLOCK], tl.float64)
        weight = tl.zeros([BLOCK], tl.float64)
        count = tl.zeros([BLOCK], tl.float64)
        correct = tl.zeros([BLOCK], tl.float64)
        for block in range(0, blocks):
            at = (block * num_sources + source) * 5
            loss += tl.load(partial_BS5 + at, mask=kept, other=0.0)
            nll += tl.load(partial_BS5 + at + 1, mask=kept, other=0.0)
            weight += tl.load(partial_BS5 + at + 2, mask=kept, other=0.0)
            count += tl.load(partial_BS5 + at + 3, mask=kept, other=0.0)
            correct += tl.load(partial_BS5 + at + 4, mask=kept, other=0.0)
        tl.store(nll_S + source, nll.to(tl.float32), mask=kept)
        tl.store(weight_S + source, weight.to(tl.float32), mask=kept)
        tl.store(count_S + source, count.to(tl.int64), mask=kept)
        tl.store(correct_S + source, correct.to(tl.int64), mask=kept)
    tl.store(loss_ptr, (tl.sum(loss, axis=0) * tl.load(inverse_ptr)).to(tl.float32))


class TritonRows:
    """Sweeps rows twice; sums over blocks of rows in a launch of its own."""

    def __init__(
        self, counted: CountedRows, targets: Tensor, weights: Tensor | None, sources: Tensor | None, num_sources: int,
        vocab: int, options: tuple[float, float, float],
    ) -> None:  # fmt: skip
        self._counted, self._targets, self._weights, self._sources = counted, targets, weights, sources
        self._num_sources, self._vocab, self._options = num_sources, vocab, options
        tokens = targets.numel()
        self._nll, self._token_loss = (targets.new_empty(tokens, dtype=torch.float32) for _ in range(2))
        self._correct = targets.new_empty(tokens, dtype=torch.int32)

    def chunk(self, z: Tensor, dz: Tensor | None, first: int) -> None:
        """Reduces rows `first` and on of those that count; writes their gradient to dz, which may lie over z."""
        counted, (softcap, z_loss, smoothing) = self._counted, self._options
        gradient, dz = dz is not None, z if dz is None else dz
        _rows[(z.shape[0],)](
            z, dz, counted.rows, counted.count, self._targets, self._weights, counted.inverse, self._nll,
            self._token_loss, self._correct, first, self._vocab, z.stride(0), dz.stride(0), softcap, z_loss, smoothing,
            WEIGHTS=self._weights is not None, GRADIENT=gradient, SOFTCAP=softcap > 0, SMOOTHING=smoothing > 0,
            **tile_of(self._vocab),
        )  # fmt: skip

    def sums(self) -> Tensor:
        """Float64 [blocks, sources, 5] of all chunks."""
        block = min(triton.next_power_of_2(self._num_sources), MAX_SOURCES)
        blocks = triton.cdiv(self._counted.most, STATISTICS_ROWS)
        partial = self._nll.new_empty((blocks, self._num_sources, 5), dtype=torch.float64)
        if blocks:
            _block_statistics[(blocks, triton.cdiv(self._num_sources, block))](
                self._counted.rows, self._counted.count, self._weights, self._sources, self._nll, self._token_loss,
                self._correct, partial, self._num_sources, WEIGHTS=self._weights is not None,
                SOURCES=self._sources is not None, ROWS=STATISTICS_ROWS, BLOCK=block, num_warps=4,
            )  # fmt: skip
        return partial


class CudaRows:
    """Reads rows once; each cluster of thread blocks sums its rows in shared memory."""

    def __init__(
        self, counted: CountedRows, targets: Tensor, weights: Tensor | None, sources: Tensor | None, num_sources: int,
        vocab: int, options: tuple[float, float, float],
    ) -> None:  # fmt: skip
        self._inputs = counted.rows, counted.count, targets, weights, sources, counted.inverse
        self._options = options
        self._cluster, clusters = clusters_of(vocab, targets.device)
        self._sums = targets.new_zeros((clusters, num_sources, 5), dtype=torch.float64)

    def chunk(self, z: Tensor, dz: Tensor | None, first: int) -> None:
        """As of TritonRows."""
        torch.ops.forge.cross_entropy_rows(z, dz, *self._inputs, self._sums, first, self._cluster, *self._options)

    def sums(self) -> Tensor:
        """As of TritonRows, a cluster for a block."""
        return self._sums


def weighted_linear_cross_entropy(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    token_weights: Tensor | None,
    source_ids: Tensor | None,
    num_sources: int,
    normalizer: Tensor | None,
    ignore_index: int,
    counted_rows: int | None,
    softcap: float,
    z_loss: float,
    label_smoothing: float,
    need_dhidden: bool,
    need_dhead: bool,
    *,
    cuda_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernels; results as the twin's schema has them, dhead in float32."""
    targets = targets.contiguous()
    weights = None if token_weights is None else token_weights.contiguous()
    sources = None if source_ids is None else source_ids.contiguous()
    vocab = lm_head.shape[0]
    counted = CountedRows(
        targets, vocab, ignore_index, counted_rows,
        weights=weights, sources=sources, num_sources=num_sources, normalizer=normalizer,
    )  # fmt: skip
    chunks = LinearHeadChunks(hidden, lm_head, counted, need_dhidden, need_dhead)
    make_rows = CudaRows if cuda_rows else TritonRows
    rows = make_rows(counted, targets, weights, sources, num_sources, vocab, (softcap, z_loss, label_smoothing))
    for first, n in chunks:
        z = chunks.logits(first, n)
        if need_dhidden or need_dhead:
            rows.chunk(z, chunks.dlogits(n), first)
            chunks.backward(first, n)
        else:
            rows.chunk(z, None, first)

    partial = rows.sums()
    loss = hidden.new_empty((), dtype=torch.float32)
    source_nll, source_weight = (hidden.new_empty(num_sources, dtype=torch.float32) for _ in range(2))
    source_count, source_correct = (hidden.new_empty(num_sources, dtype=torch.int64) for _ in range(2))
    _statistics[(1,)](
        partial, counted.inverse, loss, source_nll, source_weight, source_count, source_correct, partial.shape[0],
        num_sources, BLOCK=32, num_warps=1,
    )  # fmt: skip
    return loss, source_nll, source_weight, source_count, source_correct, chunks.dhidden, chunks.dhead


def workloads() -> list[Workload]:
    """The size of record, trained and frozen head, plain and with every option; a small vocabulary of odd length."""
    listed = []
    for tokens, width, vocab, need_dhead, options, what in (
        (8192, 4096, 128256, True, (0.0, 0.0, 0.0), "trained head"),
        (8192, 4096, 128256, False, (0.0, 0.0, 0.0), "frozen head"),
        (8192, 3584, 256000, False, (30.0, 1e-4, 0.1), "frozen head, softcap, z-loss, label smoothing"),
        (8192, 768, 50257, True, (0.0, 0.0, 0.0), "trained head"),
        (2048, 256, 4096, True, (0.0, 0.0, 0.0), "trained head, float32"),
    ):
        dtype = torch.float32 if "float32" in what else torch.bfloat16
        h, head = meta(tokens, width, dtype=dtype), meta(vocab, width, dtype=dtype)
        t, w = meta(tokens, dtype=torch.int64), meta(tokens, dtype=torch.float32)
        s = meta(tokens, dtype=torch.int32)
        call = partial(weighted_linear_cross_entropy, h, head, t, w, s, 8, None, -100, None, *options, True, need_dhead)
        name = f"weighted_linear_cross_entropy: {tokens} x {width} x {vocab}, {what}"
        matmul = 2 * tokens * width * vocab
        listed.append(Workload(name, call, 2 * (h.nbytes + head.nbytes), matmul * (3 if need_dhead else 2)))
    return listed
