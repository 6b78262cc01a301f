from collections.abc import Iterator

import pytest
import torch

from forge_core.kernels import library


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the small cases of the losses over a linear head fill several chunks in Triton, as they do in C++."""
    if library.TRITON_INTERPRETED or (library.TRITON_INSTALLED and torch.cuda.is_available()):
        from forge_core.kernels.gpu import linear_head

        monkeypatch.setattr(linear_head, "MIN_CHUNK_ROWS", 16)
        monkeypatch.setattr(linear_head, "CHUNK_BYTES", 0)
    yield


@pytest.fixture(params=[pytest.param(None, id="triton-interpreted")] if library.TRITON_INTERPRETED else [])
def cuda_rows_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives backend "triton" what "cuda" has instead of its row kernels, in the form that tests/gpu test on the CPU."""
    from forge_core.kernels.gpu import linear_token_logprobs, policy_gradient_loss, weighted_linear_cross_entropy

    for launcher in (linear_token_logprobs, policy_gradient_loss, weighted_linear_cross_entropy):
        monkeypatch.setattr(launcher, "TritonRows", launcher.CudaRows)
