import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import lora_linear, quantized
from tests.backends import Backend, backends


class Int8Rows(Tensor):
    """A weight as int8 with one scale a row, built as torchao builds its tensors; counts how often it is made dense."""

    made_dense = 0

    @staticmethod
    def __new__(cls, weight: Tensor) -> "Int8Rows":
        self = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.data8 = torch.round(weight / self.scale).to(torch.int8)
        return self

    def dequantize(self) -> Tensor:
        Int8Rows.made_dense += 1
        return (self.data8 * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} needs the dense weight")


def _inputs(dtype: torch.dtype, device: str, width: int = 32) -> list:
    torch.manual_seed(0)
    x = torch.randn(9, width, dtype=dtype, device=device, requires_grad=True)
    weights = [(torch.randn(n, width, device=device) / 6).to(dtype) for n in (16, 24)]
    a = [(torch.randn(4, width, device=device) / 6).requires_grad_() for _ in weights]
    b = [(torch.randn(n, 4, device=device) / 2).requires_grad_() for n in (16, 24)]
    bias = [torch.randn(n, device=device).to(dtype).requires_grad_() for n in (16, 24)]
    return [x, weights, a, b, bias]


def _gradients(function: Any, x: Tensor, weights: list, a: list, b: list, bias: list) -> list[Tensor]:
    ys = function(x, weights, a, b, bias)
    return [*ys, *torch.autograd.grad(sum(y.float().square().sum() for y in ys), [x, *a, *b, *bias])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "dropout_seed": 5}, {"magnitude": [None, "ones"]}])
@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_equals_the_dense_weight(backend: Backend, dtype: torch.dtype, options: dict) -> None:
    x, weights, a, b, bias = _inputs(dtype, backend.device)
    if "magnitude" in options:
        options = {"magnitude": [None, torch.ones(24, dtype=dtype, device=backend.device)]}

    def function(x: Tensor, weights: list, a: list, b: list, bias: list) -> tuple[Tensor, ...]:
        return lora_linear(x, weights, a, b, scaling=2.0, bias=bias, backend=backend.name, **options)

    mixed = [Int8Rows(weights[0]), weights[1]]
    expected = _gradients(function, x, [quantized.dense(w) for w in mixed], a, b, bias)
    actual = _gradients(function, x, mixed, a, b, bias)
    assert all(torch.equal(p, q) for p, q in zip(actual, expected, strict=True))


def test_reference_takes_it_too() -> None:
    x, weights, a, b, bias = _inputs(torch.float32, "cpu")
    mixed = [Int8Rows(w) for w in weights]
    for backend in ("reference", "cpp"):
        ys = lora_linear(x, mixed, a, b, scaling=2.0, bias=bias, backend=backend)
        plain = lora_linear(x, [w.dequantize() for w in mixed], a, b, scaling=2.0, bias=bias, backend="reference")
        torch.testing.assert_close(ys, plain)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_is_dense_only_during_a_matmul(checkpointed: bool) -> None:
    x, weights, a, b, bias = _inputs(torch.float32, "cpu")
    weight = Int8Rows(weights[0])

    def function(x: Tensor) -> Tensor:
        return lora_linear(x.sin(), weight, a[0], b[0], scaling=2.0, bias=bias[0])

    Int8Rows.made_dense = 0
    y = checkpoint(function, x, use_reentrant=False) if checkpointed else function(x)
    assert Int8Rows.made_dense == 1
    y.sum().backward()
    assert Int8Rows.made_dense == 2  # the checkpoint's recomputation ends before the matmul


@pytest.mark.parametrize("config", ["Float8WeightOnlyConfig", "Int8WeightOnlyConfig"])
def test_torchao(config: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    x, _, a, b, _ = _inputs(torch.bfloat16, "cpu")
    linear = torch.nn.Linear(32, 16, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    quantization.quantize_(linear, getattr(quantization, config)())
    assert quantized.is_quantized(linear.weight)
    y = lora_linear(x, linear.weight, a[0], b[0], scaling=2.0)
    assert torch.equal(y, lora_linear(x, linear.weight.dequantize(), a[0], b[0], scaling=2.0))
    y.sum().backward()
    assert x.grad is not None and a[0].grad is not None and b[0].grad is not None


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("compress_statistics", [False, True])
def test_bitsandbytes(quant_type: str, compress_statistics: bool) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    x, weights, a, b, bias = _inputs(torch.bfloat16, "cpu", width=64)
    layers = [
        bitsandbytes.nn.Linear4bit(
            64, w.shape[0], compute_dtype=torch.bfloat16, quant_type=quant_type, compress_statistics=compress_statistics
        )
        for w in weights
    ]
    for layer, weight, vector in zip(layers, weights, bias, strict=True):
        layer.weight.data, layer.bias.data = weight, vector.detach()
    layers = [layer.to("cpu").requires_grad_(False) for layer in layers]  # this is what quantises
    packed = [layer.weight for layer in layers]
    assert all(w.dtype == torch.uint8 for w in packed)
    dense = [bitsandbytes.functional.dequantize_4bit(w.data, w.quant_state) for w in packed]
    assert all((d - w).norm() < 0.2 * w.norm() for d, w in zip(dense, weights, strict=True))

    def function(x: Tensor, weights: list, a: list, b: list, bias: list) -> tuple[Tensor, ...]:
        return lora_linear(x, weights, a, b, scaling=2.0, bias=bias, dropout_p=0.3, dropout_seed=5)

    expected = _gradients(function, x, dense, a, b, bias)
    actual = _gradients(function, x, packed, a, b, bias)
    assert all(torch.equal(p, q) for p, q in zip(actual, expected, strict=True))
    # And what bitsandbytes itself computes, without the adapter.
    zeros = [torch.zeros_like(t) for t in b]
    for ours, layer in zip(lora_linear(x, packed, a, zeros, scaling=1.0, bias=bias), layers, strict=True):
        torch.testing.assert_close(ours, layer(x), rtol=2**-6, atol=2**-6)


def test_rows_that_bitsandbytes_decodes_wrongly_are_refused() -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    x, weights, a, b, _ = _inputs(torch.bfloat16, "cpu")
    data, state = functional.quantize_4bit(weights[0], blocksize=64, quant_type="nf4")
    weight = data.as_subclass(Packed)
    weight.quant_state = state
    with pytest.raises(ValueError, match="rows of 32 in blocks of 64"):
        lora_linear(x, weight, a[0], b[0], scaling=2.0)


class Packed(torch.nn.Parameter):
    """What a Params4bit looks like."""

    quant_state: Any


def test_without_bitsandbytes_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, a, b, _ = _inputs(torch.bfloat16, "cpu")
    weight = torch.zeros(16 * 32 // 2, 1, dtype=torch.uint8).as_subclass(Packed)
    weight.quant_state = SimpleNamespace(shape=torch.Size([16, 32]), dtype=torch.bfloat16, blocksize=32)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        lora_linear(x, weight, a[0], b[0], scaling=2.0)
    with pytest.raises(ValueError, match=r"lora_a: got shape \[4, 31\], expected \[rank, 32\]"):
        lora_linear(x, weight, a[0][:, :31], b[0], scaling=2.0)
    with pytest.raises(ValueError, match=r"weight: got torch\.bfloat16, expected the dtype of x, torch\.float32"):
        lora_linear(x.float(), weight, a[0], b[0], scaling=2.0)
