"""The arithmetic of the CUDA row kernel of weighted_linear_cross_entropy, thread by thread on the CPU; its binaries."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forge_core.kernels import library

SOURCES, IGNORE = 3, -100
PLAIN, EVERYTHING = (0.0, 0.0, 0.0), (2.0, 0.1, 0.2)  # softcap, z_loss, label_smoothing
# vocab, blocks of a cluster: one pack and less, a block without packs, the last pack not full, several packs a thread.
SIZES = [(1, 1), (3, 2), (5, 8), (64, 1), (515, 2), (4100, 1), (5003, 4), (9000, 2), (40001, 8)]


def _inputs(n: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(n, vocab, generator=g)
    targets = torch.randint(vocab, (n,), generator=g)
    return z, targets, torch.rand(n, generator=g) + 0.1, torch.randint(SOURCES, (n,), generator=g, dtype=torch.int32)


def _rows(
    z: Tensor, targets: Tensor, weights: Tensor | None, sources: Tensor | None, options: tuple[float, float, float],
    blocks: int, *, dtype: torch.dtype = torch.float32, count: int | None = None, clusters: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dz and the sums over clusters, with the gradient where the launchers put it: in the upper half of the logits."""
    n, vocab = z.shape
    stride = -(-vocab // 16) * 16
    logits = torch.full((n, stride), float("nan"))
    logits[:, :vocab] = z
    dz = logits.view(dtype)[:, stride : stride + vocab] if dtype == torch.bfloat16 else logits[:, :vocab]
    sums = torch.zeros(clusters, SOURCES, 5, dtype=torch.float64)
    rows = torch.arange(n, dtype=torch.int32)
    counted = torch.tensor([n if count is None else count], dtype=torch.int32)
    torch.ops.forge.cross_entropy_rows(
        logits[:, :vocab], dz, rows, counted, targets, weights, sources, torch.tensor([0.5], dtype=torch.float64), sums,
        0, blocks, *options,
    )  # fmt: skip
    return dz, sums.sum(0)


def _expected(
    z: Tensor, targets: Tensor, weights: Tensor, sources: Tensor, options: tuple[float, float, float]
) -> tuple[Tensor, Tensor]:
    """By autograd in the dtype of z."""
    softcap, z_loss, smoothing = options
    z = z.detach().requires_grad_()
    y = softcap * torch.tanh(z / softcap) if softcap else z
    log_z = torch.logsumexp(y, 1)
    nll = log_z - y.gather(1, targets[:, None])[:, 0]
    loss = (1 - smoothing) * nll + smoothing * (log_z - y.mean(1)) + z_loss * log_z.square()
    w = weights.to(z.dtype)
    correct = (y.argmax(1) == targets).to(z.dtype)
    columns = torch.stack([w * loss, w * nll, w, torch.ones_like(w), correct], 1)
    sums = F.one_hot(sources.long(), SOURCES).to(z.dtype).T @ columns
    (dz,) = torch.autograd.grad((w * loss).sum() * 0.5, z)
    return dz, sums.detach()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [PLAIN, EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_arithmetic_matches_torch(
    size: tuple[int, int], options: tuple[float, float, float], dtype: torch.dtype
) -> None:
    vocab, blocks = size
    z, targets, weights, sources = _inputs(32, vocab)
    z[0, -1] = z[0].max() + 1  # the largest logit last
    z[1] = 1.5  # all equal: the first one is the prediction
    targets[0], targets[1], targets[2] = vocab - 1, 0, z[2].argmax()
    dz, sums = _rows(z, targets, weights, sources, options, blocks, dtype=dtype)
    exact_dz, exact_sums = _expected(z.double(), targets, weights, sources, options)
    plain_dz, plain_sums = _expected(z, targets, weights, sources, options)
    ulp = torch.finfo(dtype).eps
    for ours, plain, exact, eps in (
        (dz, plain_dz.to(dtype), exact_dz, ulp),
        (sums, plain_sums, exact_sums, torch.finfo(torch.float32).eps),
    ):
        # The one rule of tests/tolerance.py, for results that no public op returns.
        allowed = 2 * (plain.double() - exact).abs().max() + 2 * eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= allowed
    assert torch.equal(sums[:, 3:], exact_sums[:, 3:])  # rows, and rows predicted


def test_ties_go_to_the_first_index() -> None:
    z = torch.zeros(3, 4099)
    z[:, [70, 4090]] = 2.0
    targets = torch.tensor([70, 4090, 71])
    _, sums = _rows(z, targets, None, None, PLAIN, 2)
    assert sums[0].tolist()[2:] == [3.0, 3.0, 1.0]


def test_rows_behind_the_last_that_counts_are_cleared() -> None:
    z, targets, weights, sources = _inputs(5, 100)
    dz, sums = _rows(z, targets, weights, sources, PLAIN, 2, count=3)
    assert torch.equal(dz[3:], torch.zeros(2, 100)) and dz[:3].abs().max() > 0
    assert sums[:, 3].sum() == 3
    dz, sums = _rows(z, targets, weights, sources, PLAIN, 2, count=0)
    assert not dz.any() and not sums.any()


def test_without_a_gradient_logits_stay() -> None:
    z, targets, weights, sources = _inputs(4, 64)
    kept = z.clone()
    sums = torch.zeros(1, SOURCES, 5, dtype=torch.float64)
    torch.ops.forge.cross_entropy_rows(
        z, None, torch.arange(4, dtype=torch.int32), torch.tensor([4], dtype=torch.int32), targets, weights, sources,
        torch.ones(1, dtype=torch.float64), sums, 0, 1, *PLAIN,
    )  # fmt: skip
    assert torch.equal(z, kept)
    torch.testing.assert_close(sums[0], _expected(z.double(), targets, weights, sources, PLAIN)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 6)}, "logits: .*multiple of 16 bytes"),
        ({"dlogits": torch.zeros(2, 8).half()}, "dlogits: .*float32 or bfloat16"),
        ({"sums": torch.zeros(1, 1, 5)}, "sums: .*float64"),
        ({"cluster": 3}, "cluster: got 3"),
    ],
)
def test_arguments_are_checked(change: dict, message: str) -> None:
    logits = torch.zeros(2, 8)
    arguments = {
        "logits": logits, "dlogits": logits, "rows": torch.arange(2, dtype=torch.int32),
        "count": torch.tensor([2], dtype=torch.int32), "targets": torch.zeros(2, dtype=torch.int64),
        "token_weights": None, "source_ids": None, "inverse": torch.ones(1, dtype=torch.float64),
        "sums": torch.zeros(1, 1, 5, dtype=torch.float64), "first": 0, "cluster": 1,
    } | change  # fmt: skip
    with pytest.raises(ValueError, match=message):
        torch.ops.forge.cross_entropy_rows(*arguments.values(), *PLAIN)


LIBRARY = Path(library.__file__).parent / "_C_cuda.so"


@pytest.mark.skipif(not LIBRARY.is_file(), reason="built without nvcc")
@pytest.mark.skipif(not library.TRITON_INSTALLED, reason="the disassembler comes with triton")
def test_no_cuda_kernel_spills() -> None:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "--dump-resource-usage", LIBRARY], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    names = [name for name, *_ in found]
    for kernel in ("rows_kernel", "forward_kernel", "blocks_kernel", "sums_kernel"):
        assert any(kernel in name for name in names)
    assert [f for f in found if int(f[2]) + int(f[3])] == []
