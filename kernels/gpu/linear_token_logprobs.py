"""linear_token_logprobs on GPUs: log-probability and entropy per token. The backward takes any upstream gradients and
computes the logits of each chunk again: four matmuls in all, and no tokens x vocab matrix.
"""

from functools import partial

import torch
from torch import Tensor

from .linear_head import CountedRows, LinearHeadChunks
from .token_rows import CudaRows, TritonRows
from .workload import Workload, meta


def linear_token_logprobs(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    temperature: float,
    softcap: float,
    ignore_index: int,
    counted_rows: int | None,
    *,
    cuda_rows: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the forward kernels; results as the op's schema has them."""
    targets, vocab = targets.contiguous(), lm_head.shape[0]
    counted = CountedRows(targets, vocab, ignore_index, counted_rows)
    chunks = LinearHeadChunks(hidden, lm_head, counted, False, False)
    rows = (CudaRows if cuda_rows else TritonRows)(counted, targets, vocab, temperature, softcap)
    for first, n in chunks:
        rows.measure(chunks.logits(first, n), first)
    return rows.logprob.float(), rows.entropy, rows.softmax


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
    *,
    cuda_rows: bool = False,
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernels; results as the op's schema has them."""
    targets, dlogprob, dentropy = targets.contiguous(), dlogprob.contiguous(), dentropy.contiguous()
    vocab = lm_head.shape[0]
    counted = CountedRows(targets, vocab, ignore_index, counted_rows)
    chunks = LinearHeadChunks(hidden, lm_head, counted, need_dhidden, need_dhead)
    make = CudaRows if cuda_rows else TritonRows
    rows = make(counted, targets, vocab, temperature, softcap, entropy, softmax)
    for first, n in chunks:
        rows.gradient(chunks.logits(first, n), chunks.dlogits(n), first, dlogprob, dentropy)
        chunks.backward(first, n)
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
