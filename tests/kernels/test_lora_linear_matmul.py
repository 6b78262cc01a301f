"""Every way of lora_linear's large matmul on a GPU; in Triton's interpreter, the Triton kernel with small tiles."""

import pytest
import torch
from torch import Tensor

from forge_core.kernels import library, lora_linear, reference
from tests.backends import Backend, backends
from tests.tolerance import assert_as_accurate

TRITON = [backend for backend in backends("lora_linear") if "triton" in str(backend.id)]
SEED, P = torch.tensor(7), 0.3


@pytest.mark.parametrize(
    ("nt", "reductions", "ranks", "p"),
    [
        (True, (64,), (16,), 0.0),
        (True, (40,), (5,), 0.0),
        (False, (40,), (16,), P),
        (False, (64, 40), (16, 8), 0.0),
        (False, (64, 40, 48), (16, 32, 16), P),
    ],
)
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("backend", TRITON)
def test_every_way(backend: Backend, nt: bool, reductions: tuple, ranks: tuple, p: float, tma: bool) -> None:
    from forge_core.kernels.gpu.lora_linear_choice import matmul, ways
    from forge_core.kernels.gpu.lora_linear_gemm import Config, Operands, launch
    from forge_core.kernels.gpu.lora_linear_launch import dropout_bits

    scale = 1 if library.TRITON_INTERPRETED else 8  # several tiles of the configurations that a GPU is given
    m, n, reductions = 70 * scale, 96 * scale, tuple(scale * k for k in reductions)
    torch.manual_seed(0)
    xs = [torch.randn(m, k).bfloat16() for k in reductions]
    ws = [(torch.randn(*((n, k) if nt else (k, n))) / k**0.5).bfloat16() for k in reductions]
    s = torch.randn(m, sum(ranks)).bfloat16()
    bs = [(torch.randn(*((n, r) if nt else (r, n))) / r**0.5).bfloat16() for r in ranks]
    bias = torch.randn(n).bfloat16() if nt else None

    def expected(dtype: torch.dtype) -> Tensor:
        total = torch.zeros(m, n, dtype=dtype) if bias is None else bias.to(dtype)
        for i, (x, w, part, b) in enumerate(zip(xs, ws, s.split(ranks, 1), bs, strict=True)):
            x, w, part, b = (t.to(dtype) for t in (x, w, part, b))
            product = part @ (b.T if nt else b)
            if p:
                product = product * reference.dropout_factors((m, n), p, SEED, i, dtype)
            total = total + x @ (w.T if nt else w) + product
        return total

    def there(t: Tensor) -> Tensor:
        return t.to(backend.device)

    words = dropout_bits(p, there(SEED), len(ranks), m, n, torch.device(backend.device)) if p else None
    operands = Operands(
        list(map(there, xs)), list(map(there, ws)), there(s), list(map(there, bs)),
        None if bias is None else there(bias), words, 1 / (1 - p), nt,
    )  # fmt: skip
    if library.TRITON_INTERPRETED:
        results = {str(tma): launch(operands, Config(32, 64 if tma else 32, 32, 4, 3, tma=tma))}
    else:
        results = {way: matmul(operands, way) for way in ways(operands, torch.cuda.get_device_capability())}
    for way, result in results.items():
        assert_as_accurate(way, result.cpu(), expected(torch.float32).bfloat16(), expected(torch.float64))


@pytest.mark.parametrize("backend", backends("lora_linear", gpu_only=True))
def test_a_cuda_graph_replays_with_new_inputs_and_seed(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_TUNING", "off")  # nothing is timed inside a capture: the same way inside and outside
    torch.manual_seed(0)
    x = torch.randn(300, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = [(torch.randn(n, 256, device="cuda") / 16).bfloat16() for n in (512, 128)]
    a = [(torch.randn(16, 256, device="cuda") / 16).requires_grad_() for _ in weights]
    b = [(torch.randn(n, 16, device="cuda") / 4).requires_grad_() for n in (512, 128)]
    dys = [torch.randn(300, n, device="cuda", dtype=torch.bfloat16) for n in (512, 128)]
    seed = torch.tensor(1, device="cuda")

    def step() -> tuple[Tensor, ...]:
        ys = lora_linear(x, weights, a, b, scaling=2.0, dropout_p=0.2, dropout_seed=seed, backend=backend.name)
        return (*ys, *torch.autograd.grad(ys, [x, *a, *b], dys))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new_seed in (1, 2):
        with torch.no_grad():
            x.normal_()
        seed.fill_(new_seed)
        graph.replay()
        assert all(torch.equal(p, q) for p, q in zip(captured, step(), strict=True))
