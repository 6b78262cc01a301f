import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from forge_core.kernels import frozen_linear, reference
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
# tokens, in, out of each layer: one token, few (weights read in place), many (x read in place), odd sizes, depths of
# more than one block (2048), panels of every width (16, 32, 48, 64 and more), nothing.
SIZES = [
    (1, 24, (17,)),
    (7, 33, (20, 65)),
    (64, 4130, (70,)),
    (65, 50, (16, 33, 47, 64, 129)),
    (70, 130, (2070,)),
    (331, 64, (100,)),
    (0, 8, (4, 6)),
]


def _inputs(size: tuple, dtype: torch.dtype, bias: bool) -> list:
    tokens, features, outs = size
    torch.manual_seed(0)
    x = torch.randn(tokens, features, dtype=dtype, requires_grad=True)
    weights = [(torch.randn(out, features) / features**0.5).to(dtype) for out in outs]
    return [x, weights, [torch.randn(out).to(dtype) for out in outs] if bias else [None] * len(outs)]


def _cpp(x: Tensor, weights: list, biases: list) -> tuple[Tensor, ...]:
    return frozen_linear(x, weights, biases, backend="cpp")


def _reference(x: Tensor, weights: list, biases: list) -> tuple[Tensor, ...]:
    return tuple(reference.frozen_linear(x, weights, biases))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_matches_reference(size: tuple, dtype: torch.dtype, bias: bool) -> None:
    check_op(_cpp, _reference, _inputs(size, dtype, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [5, 80])
def test_transposed_weight_and_strided_input(dtype: torch.dtype, tokens: int) -> None:
    x = torch.randn(tokens, 96, dtype=dtype)[:, ::2].requires_grad_()
    check_op(_cpp, _reference, [x, [torch.randn(48, 30, dtype=dtype).t() / 7], [None]])


@pytest.mark.parametrize("tokens", [3, 200])
def test_bitwise_repeatable_for_any_number_of_threads(tokens: int) -> None:
    x, weights, biases = _inputs((tokens, 300, (65, 700)), torch.bfloat16, True)
    results = []
    for threads in (1, 2, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        outputs = _cpp(x, weights, biases)
        results.append([*outputs, *torch.autograd.grad(outputs, x, [torch.ones_like(y) for y in outputs])])
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_opcheck_and_compile() -> None:
    x, weights, biases = _inputs((9, 40, (24, 8)), torch.bfloat16, True)
    torch.library.opcheck(torch.ops.forge.frozen_linear.default, (x, weights, biases))
    compiled = torch.compile(frozen_linear, fullgraph=True, backend="aot_eager")
    for ours, eager in zip(compiled(x, weights, biases), frozen_linear(x, weights, biases), strict=True):
        assert torch.equal(ours, eager)


def test_leading_dimensions_and_missing_biases() -> None:
    x, bias = torch.randn(2, 3, 8), torch.randn(5)
    weights = [torch.randn(5, 8), torch.randn(4, 8)]
    first, second = frozen_linear(x, weights, [bias, None])
    torch.testing.assert_close(first, F.linear(x, weights[0], bias))
    torch.testing.assert_close(second, F.linear(x, weights[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": []}, r"biases: got 0 entries, expected one per weight"),
        ({"biases": [None, None]}, r"biases: got 2 entries, expected one per weight, 1"),
        ({"weights": [torch.ones(4, 7)]}, r"weights\[0\]: got shape \[4, 7\] with x of \[2, 8\], expected \[out, in\]"),
        ({"biases": [torch.ones(3)]}, r"biases\[0\]: got shape \[3\], expected \[4\]"),
        ({"weights": [torch.ones(4, 8).double()]}, r"weights\[0\]: got torch.float64, expected the dtype of x"),
        ({"weights": [torch.ones(4, 8, requires_grad=True)]}, r"weights\[0\]: requires a gradient"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "weights": [torch.ones(4, 8)]} | change
    with pytest.raises(ValueError, match=message):
        frozen_linear(**arguments)
