"""linear_token_logprobs in Triton: log-probability and entropy per token. The backward takes any upstream gradients and
computes the logits of each chunk again: four matmuls in all, and no tokens x vocab matrix.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_head import CountedRows, LinearHeadChunks
from .softmax_row import clear_row, row_sums, tile_of, write_gradient
from .workload import Workload, meta


@triton.jit
def _forward(
    z_RV, rows_T, count_ptr, targets_T, logprob_T, entropy_T, softmax_2T, first, tokens, vocab, stride, softcap, scale,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0)
    if row < tl.load(count_ptr):
        z_V = z_RV + tl.program_id(0).to(tl.int64) * stride
        token = tl.load(rows_T + row)
        target = tl.load(targets_T + token).to(tl.int32)
        row_max, log_sum, logprob, _, _, entropy = row_sums(
            z_V, vocab, target, softcap, scale, SOFTCAP, SCALED, False, True, UNROLL, LANES
        )
        tl.store(logprob_T + token, logprob.to(logprob_T.dtype.element_ty))
        tl.store(entropy_T + token, entropy)
        # Kept apart: their sum would lose what makes p = 1 exact.
        tl.store(softmax_2T + token, row_max)
        tl.store(softmax_2T + tokens + token, log_sum.to(tl.float32))


@triton.jit
def _backward(
    z_RV, dz_RV, rows_T, count_ptr, targets_T, dlogprob_T, dentropy_T, entropy_T, softmax_2T,
    first, tokens, vocab, stride, dz_stride, softcap, scale,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, UNROLL: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = first + tl.program_id(0)
    dz_V = dz_RV + tl.program_id(0).to(tl.int64) * dz_stride
    if row < tl.load(count_ptr):
        z_V = z_RV + tl.program_id(0).to(tl.int64) * stride
        token = tl.load(rows_T + row)
        target = tl.load(targets_T + token).to(tl.int32)
        g = tl.load(dlogprob_T + token)
        h = tl.load(dentropy_T + token)
        # With p = softmax(y) and its entropy H: d logprob / dy = onehot - p, dH / dy = -p * (log p + H).
        write_gradient(
            z_V, dz_V, vocab, target, tl.load(softmax_2T + token), tl.load(softmax_2T + tokens + token), g,
            -(g + h * tl.load(entropy_T + token)), -h, 0.0, softcap, scale, SOFTCAP, SCALED, True, UNROLL, LANES,
        )  # fmt: skip
    else:
        clear_row(dz_V, vocab, UNROLL * LANES)


def token_logprobs(
    chunks: LinearHeadChunks,
    counted: CountedRows,
    targets: Tensor,
    temperature: float,
    softcap: float,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability in `dtype`, entropy, (row maximum, log of the sum) of every row, 0 where it does not count."""
    tokens, vocab = targets.numel(), chunks.vocab
    logprob, entropy = targets.new_zeros(tokens, dtype=dtype), targets.new_zeros(tokens, dtype=torch.float32)
    softmax = targets.new_zeros((2, tokens), dtype=torch.float32)
    for first, n in chunks:
        z = chunks.logits(first, n)
        _forward[(n,)](
            z, counted.rows, counted.count, targets, logprob, entropy, softmax, first, tokens, vocab, z.stride(0),
            softcap, 1.0 / temperature, SOFTCAP=softcap > 0, SCALED=temperature != 1, **tile_of(vocab),
        )  # fmt: skip
    return logprob, entropy, softmax


def token_logprobs_backward(
    chunks: LinearHeadChunks,
    counted: CountedRows,
    dlogprob: Tensor,
    dentropy: Tensor,
    targets: Tensor,
    entropy: Tensor,
    softmax: Tensor,
    temperature: float,
    softcap: float,
) -> None:
    """Computes the logits again and adds to the gradients of `chunks`."""
    tokens, vocab = targets.numel(), chunks.vocab
    for first, n in chunks:
        z = chunks.logits(first, n)
        dz = chunks.dlogits(n)
        _backward[(n,)](
            z, dz, counted.rows, counted.count, targets, dlogprob, dentropy, entropy, softmax,
            first, tokens, vocab, z.stride(0), dz.stride(0), softcap, 1.0 / temperature,
            SOFTCAP=softcap > 0, SCALED=temperature != 1, **tile_of(vocab),
        )  # fmt: skip
        chunks.backward(first, n)


def linear_token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    counted_rows: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward kernels; results as the op's schema has them."""
    targets = targets.contiguous()
    counted = CountedRows(targets, lm_head.shape[0], ignore_index, counted_rows)
    chunks = LinearHeadChunks(hidden, lm_head, counted, False, False)
    return token_logprobs(chunks, counted, targets, temperature, softcap)


def linear_token_logprobs_backward(
    dlogprob: Tensor,
    dentropy: Tensor,
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    entropy: Tensor,
    softmax: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    counted_rows: int | None,
    need_dhidden: bool,
    need_dhead: bool,
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernels; results as the op's schema has them."""
    targets, dlogprob, dentropy = targets.contiguous(), dlogprob.contiguous(), dentropy.contiguous()
    counted = CountedRows(targets, lm_head.shape[0], ignore_index, counted_rows)
    chunks = LinearHeadChunks(hidden, lm_head, counted, need_dhidden, need_dhead)
    token_logprobs_backward(chunks, counted, dlogprob, dentropy, targets, entropy, softmax, temperature, softcap)
    return chunks.dhidden, chunks.dhead.to(lm_head.dtype)


def workloads() -> list[Workload]:
    """The size of record, and one with a softcap and a temperature."""
    listed = []
    for tokens, width, vocab, temperature, softcap in ((8192, 4096, 128256, 1.0, 0.0), (8192, 3584, 256000, 0.7, 30.0)):
        h, head, t = meta(tokens, width), meta(vocab, width), meta(tokens, dtype=torch.int64)
        values, softmax = meta(tokens, dtype=torch.float32), meta(2, tokens, dtype=torch.float32)
        options = (temperature, softcap, -100, None)
        forward = partial(linear_token_logprobs, h, head, t, *options)
        backward = partial(
            linear_token_logprobs_backward, values, values, h, head, t, values, softmax, *options, True, False
        )
        name, least, matmul = f"{tokens} x {width} x {vocab}", h.nbytes + head.nbytes, 2 * tokens * width * vocab
        listed.append(Workload(f"linear_token_logprobs: forward {name}", forward, least, matmul))
        listed.append(
            Workload(f"linear_token_logprobs: backward {name}, frozen head", backward, least + h.nbytes, 2 * matmul)
        )
    return listed
