import pytest
import torch

from forge_core.kernels import linear_argmax

needs_dot_product = pytest.mark.skipif(
    not torch.ops.forge.has_bf16_dot_product(), reason="this CPU (or FORGE_CPU_ISA) has no bfloat16 dot product"
)
# tokens, hidden, vocab: one of everything, odd sizes, one to four vectors of rows, more rows than one pass takes, parts
# of a strip of 48.
SIZES = [(1, 1, 1), (1, 24, 17), (7, 33, 100), (17, 64, 48), (33, 130, 1000), (64, 40, 49), (131, 64, 700), (0, 8, 5)]


def _inputs(tokens: int, hidden: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(tokens, hidden).bfloat16(), torch.randn(vocab, hidden).bfloat16()


@needs_dot_product
@pytest.mark.parametrize("size", SIZES)
def test_is_the_largest_logit(size: tuple[int, int, int]) -> None:
    hidden, head = _inputs(*size)
    expected = (hidden.double() @ head.double().T).argmax(-1)
    assert torch.equal(linear_argmax(hidden, head, backend="cpp"), expected)
    assert torch.equal(linear_argmax(hidden.double(), head.double(), backend="reference"), expected)


@needs_dot_product
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_takes_the_first_of_equals_for_any_number_of_threads(dtype: torch.dtype) -> None:
    hidden, head = (x.to(dtype) for x in _inputs(40, 16, 500))
    twice = torch.cat([head, head, head])
    before = torch.get_num_threads()
    expected = linear_argmax(hidden, head)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert torch.equal(linear_argmax(hidden, twice), expected)
    torch.set_num_threads(before)
    assert linear_argmax(hidden, torch.zeros_like(head)).tolist() == [0] * 40


def test_opcheck_compile_and_fallback() -> None:
    hidden, head = _inputs(5, 16, 60)
    wide = linear_argmax(hidden.float(), head.float())
    assert torch.equal(wide, (hidden.double() @ head.double().T).argmax(-1))
    if torch.ops.forge.has_bf16_dot_product():
        torch.library.opcheck(torch.ops.forge.linear_argmax.default, (hidden, head))
        strided = torch.cat([head, head], dim=1)[:, :16]
        assert torch.equal(linear_argmax(hidden, strided), linear_argmax(hidden, head))
    compiled = torch.compile(linear_argmax, backend="aot_eager")
    assert torch.equal(compiled(hidden, head), linear_argmax(hidden, head))


@pytest.mark.parametrize(
    ("hidden", "head", "backend", "message"),
    [
        (torch.ones(2, 4), torch.ones(3, 5), "auto", r"hidden, lm_head: got shapes \[2, 4\] and \[3, 5\]"),
        (torch.ones(2, 4), torch.ones(0, 4), "auto", r"vocab at least 1"),
        (torch.ones(2, 4), torch.ones(3, 4).double(), "auto", r"lm_head: got torch.float64"),
        (torch.ones(2, 4), torch.ones(3, 4), "cpp", r"takes bfloat16 only"),
    ],
)
def test_errors(hidden: torch.Tensor, head: torch.Tensor, backend: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_argmax(hidden, head, backend=backend)
