"""What lora_linear keeps for its backward pass, as torch's allocator counts it on a GPU."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.ops.lora_linear import LLAMA_8B, adapters_as, methods, projections

TOKENS, RANK, P = 2048, 16, 0.1
AT_MOST = 0.55  # of what PEFT keeps, bfloat16 adapters, for the seven projections of a Llama-3-8B layer


def _kept(forward: Callable[[], tuple[Tensor, ...]]) -> int:
    """Bytes that live between forward and backward, outputs left out."""
    before = torch.cuda.memory_allocated()
    outputs = forward()
    kept = torch.cuda.memory_allocated() - before
    return kept - sum(y.numel() * y.element_size() for y in outputs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_keeps_about_half_of_what_peft_keeps() -> None:
    torch.manual_seed(0)
    total = {"forge": 0, "PEFT bf16": 0}
    for k, widths in LLAMA_8B:
        x = torch.randn(TOKENS, k, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weights, *sides = projections(k, widths, RANK, "cuda")
        for name in total:
            run, dtype = methods(P)[name]
            a, b = adapters_as(dtype, *sides)
            forward = partial(run, x, weights, a, b)
            forward()  # workspaces of libraries
            total[name] += _kept(forward)
        total["forge"] += x.numel() * x.element_size()  # needed by dA; PEFT needs the dropped copies that it makes
    assert 0 < total["forge"] <= AT_MOST * total["PEFT bf16"], total
