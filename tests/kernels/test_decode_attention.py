import pytest
import torch
from torch import Tensor

from forge_core.kernels import decode_attention, packed_attention, reference
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
# sequences, rows of the cache, q_heads, kv_heads, capacity, d: one of everything, odd sizes, grouped heads, the
# unrolled head dimensions, more rows than sequences.
SIZES = [(1, 1, 1, 1, 1, 4), (3, 3, 4, 2, 19, 17), (5, 7, 9, 3, 70, 64), (2, 4, 8, 1, 130, 128)]
VARIANTS = [{}, {"window": 5}, {"softcap": 3.0, "scale": 0.3}]


def _inputs(size: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    sequences, rows, q_heads, kv_heads, capacity, d = size
    torch.manual_seed(0)
    q = torch.randn(sequences, q_heads, d, dtype=dtype)
    keys, values = (torch.randn(rows, kv_heads, capacity, d, dtype=dtype) for _ in range(2))
    lengths = torch.randint(1, capacity + 1, (sequences,))
    lengths[0] = capacity
    return [q, keys, values, lengths]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_matches_reference(size: tuple[int, ...], dtype: torch.dtype, variant: dict) -> None:
    options = {"window": None, "softcap": None, "scale": size[-1] ** -0.5} | variant
    check_op(
        lambda *inputs: decode_attention(*inputs, **variant, backend="cpp"),
        lambda *inputs: reference.decode_attention(*inputs, **options),
        _inputs(size, dtype),
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_is_the_last_row_of_packed_attention(backend: str, variant: dict) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(21, heads, 16) for heads in (4, 2, 2))
    whole = packed_attention(q, k, v, torch.tensor([0, 21], dtype=torch.int32), **variant, backend="reference")
    keys, values = (x.transpose(0, 1)[None].contiguous() for x in (k, v))
    last = decode_attention(q[-1:], keys, values, torch.tensor([21]), **variant, backend=backend)
    torch.testing.assert_close(last, whole[-1:])


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_lies_behind_a_length_is_not_read(backend: str) -> None:
    q, keys, values, _ = _inputs((3, 3, 4, 2, 19, 17), torch.float32)
    lengths = torch.tensor([1, 7, 18])
    expected = decode_attention(q, keys, values, lengths, backend=backend)
    for i, length in enumerate(lengths.tolist()):
        keys[i, :, length:] = torch.nan
        values[i, :, length:] = torch.inf
    assert torch.equal(decode_attention(q, keys, values, lengths, backend=backend), expected)


def test_same_for_any_number_of_threads_opcheck_and_compile() -> None:
    inputs = _inputs(SIZES[2], torch.bfloat16)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = decode_attention(*inputs)
    torch.set_num_threads(2)
    both = decode_attention(*inputs)
    torch.set_num_threads(before)
    assert torch.equal(alone, both)
    torch.library.opcheck(torch.ops.forge.decode_attention.default, (*inputs, 0, 0.0, 0.125))
    assert torch.equal(torch.compile(decode_attention, fullgraph=True, backend="aot_eager")(*inputs), alone)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("q", torch.ones(2, 4), r"q: got shape \[2, 4\], expected \[sequences, q_heads, d\]"),
        ("keys", torch.ones(1, 2, 5, 8), r"keys: got shape \[1, 2, 5, 8\], expected \[at least 2, kv_heads, capacity"),
        ("keys", torch.ones(2, 5, 2, 8).transpose(1, 2), r"keys: got strides .*, expected a contiguous cache"),
        ("values", torch.ones(2, 2, 5, 8).double(), r"values: got torch.float64, expected the dtype of q"),
        ("values", torch.ones(2, 3, 5, 8), r"keys, values: got shapes"),
        ("lengths", torch.ones(2), r"lengths: got torch.float32 of shape \[2\], expected int64 \[2\]"),
        ("window", 0, r"window: got 0, expected at least 1"),
        ("softcap", -1.0, r"softcap: got -1.0, expected a number above 0"),
        ("q", torch.ones(2, 4, 8, requires_grad=True), r"for inference; use no_grad"),
    ],
)
def test_errors(name: str, value: object, message: str) -> None:
    cache = torch.ones(2, 2, 5, 8)
    arguments = {"q": torch.ones(2, 4, 8), "keys": cache, "values": cache, "lengths": torch.tensor([1, 5])}
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments | {name: value})


@pytest.mark.parametrize("length", [0, 6])
def test_length_out_of_range_is_refused(length: int) -> None:
    cache = torch.ones(1, 1, 5, 8)
    with pytest.raises(ValueError, match=rf"lengths: got {length} at index 0, expected 1 to 5"):
        decode_attention(torch.ones(1, 1, 8), cache, cache, torch.tensor([length]), backend="cpp")
