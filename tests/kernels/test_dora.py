import pytest
import torch
from torch import Tensor

from forge_core.kernels import lora_linear, reference
from tests.backends import Backend, backends
from tests.tolerance import check_op

DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
OUTS, RANKS, SCALINGS = (20, 33), (8, 3), [0.7, 1.5]


def _inputs(dtype: torch.dtype, adapter: torch.dtype) -> list:
    torch.manual_seed(0)
    x = torch.randn(33, 48, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(out, 48) / 48**0.5).to(dtype) for out in OUTS]
    a = [(torch.randn(r, 48) / 48**0.5).to(adapter).requires_grad_() for r in RANKS]
    b = [(torch.randn(out, r) / r**0.5).to(adapter).requires_grad_() for out, r in zip(OUTS, RANKS, strict=True)]
    magnitudes = [(1 + torch.rand(out)).to(adapter).requires_grad_() for out in OUTS]
    biases = [torch.randn(out).to(dtype).requires_grad_() for out in OUTS]
    return [x, weights, a, b, magnitudes, biases]


def _definition(x: Tensor, weights: list, a: list, b: list, magnitudes: list, biases: list) -> tuple[Tensor, ...]:
    wide = reference.compute_dtype(x)
    outputs = []
    for w, ai, bi, m, bias, s in zip(weights, a, b, magnitudes, biases, SCALINGS, strict=True):
        ai, bi = ai.to(x.dtype).to(wide), bi.to(x.dtype).to(wide)
        adapted = w.to(wide) + s * bi @ ai
        y = (x.to(wide) @ adapted.T).to(x.dtype)  # plain torch multiplies and adds to a rounded output, as PEFT does
        outputs.append((y * (m.to(wide) / adapted.detach().norm(dim=1)) + bias).to(x.dtype))
    return tuple(outputs)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("backend", backends("lora_linear"))
def test_matches_definition(backend: Backend, dtypes: tuple) -> None:
    check_op(
        lambda x, w, a, b, m, c: lora_linear(
            x, w, a, b, scaling=SCALINGS, bias=c, magnitude=m, backend=backend.name
        ),
        _definition,
        _inputs(*dtypes),
        device=backend.device,
    )  # fmt: skip


def test_fresh_adapter_with_the_norms_of_the_weight_changes_nothing() -> None:
    x, [weight, _], [a, _], [b, _], _, [bias, _] = _inputs(torch.float64, torch.float64)
    y = lora_linear(x, weight, a, torch.zeros_like(b), scaling=1.0, bias=bias, magnitude=weight.norm(dim=1))
    torch.testing.assert_close(y, x @ weight.T + bias)


def test_a_projection_of_a_group_may_have_none() -> None:
    x, weights, a, b, magnitudes, biases = _inputs(torch.float32, torch.float32)
    mixed = lora_linear(x, weights, a, b, scaling=SCALINGS, bias=biases, magnitude=[magnitudes[0], None])
    plain = lora_linear(x, weights, a, b, scaling=SCALINGS, bias=biases)
    torch.testing.assert_close(mixed[1], plain[1])
    assert not torch.allclose(mixed[0], plain[0])


def test_dropout_reaches_the_adapter_only() -> None:
    x, weights, a, b, magnitudes, _ = _inputs(torch.float64, torch.float64)
    factors = [reference.dropout_factors((33, 48), 0.4, torch.tensor(3), i, torch.float64) for i in range(2)]
    ys = lora_linear(x, weights, a, b, scaling=SCALINGS, magnitude=magnitudes, dropout_p=0.4, dropout_seed=3)
    for y, w, ai, bi, m, s, kept in zip(ys, weights, a, b, magnitudes, SCALINGS, factors, strict=True):
        norm = (w + s * bi @ ai).norm(dim=1)
        torch.testing.assert_close(y, (x @ w.T + s * (x * kept) @ ai.T @ bi.T) * m / norm)


def test_errors_name_the_argument() -> None:
    x, [weight, _], [a, _], [b, _], [m, _], _ = _inputs(torch.float32, torch.float32)
    with pytest.raises(ValueError, match=r"magnitude: got shape \[19\], expected \[20\]"):
        lora_linear(x, weight, a, b, scaling=1.0, magnitude=m[:19])
    with pytest.raises(ValueError, match=r"magnitude: got torch\.bfloat16, expected torch\.float32 as x"):
        lora_linear(x, weight, a, b, scaling=1.0, magnitude=m.bfloat16())
    with pytest.raises(ValueError, match=r"magnitude: got 1 entries, expected one per weight, 2"):
        lora_linear(x, [weight] * 2, [a] * 2, [b] * 2, scaling=1.0, magnitude=[m])
