import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from forge_core.kernels import packed_attention, reference

# A tail of 3 rows after the last document; zero-length documents at the start, inside and at the end.
BOUNDS = [0, 0, 1, 8, 8, 30, 47, 47]
TOKENS = 50
OPTIONS = [
    (True, None, None),
    (False, None, None),
    (True, 5, None),
    (False, 5, None),
    (True, None, 2.0),
    (False, 3, 0.5),
]


def _inputs(tokens: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def _cu_seqlens(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


@pytest.mark.parametrize(("causal", "window", "softcap"), OPTIONS)
def test_reference_is_sdpa_with_a_block_mask(causal: bool, window: int | None, softcap: float | None) -> None:
    q, k, v = _inputs(TOKENS, 4, 2, 8, torch.float64)
    document = torch.bucketize(torch.arange(TOKENS), torch.tensor(BOUNDS), right=True)
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    visible = document[:, None] == document
    if causal:
        visible &= distance >= 0
    if window is not None:
        visible &= distance.abs() < window
    q_hid, k_hid, v_hid = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    if softcap is None:
        expected = scaled_dot_product_attention(q_hid, k_hid, v_hid, attn_mask=visible, scale=0.3).transpose(0, 1)
    else:
        logits = softcap * torch.tanh(0.3 * q_hid @ k_hid.mT / softcap)
        expected = (logits.masked_fill(~visible, -torch.inf).softmax(-1) @ v_hid).transpose(0, 1)
    actual = packed_attention(
        q, k, v, _cu_seqlens(BOUNDS), causal=causal, window=window, softcap=softcap, scale=0.3, backend="reference"
    )
    torch.testing.assert_close(actual[: BOUNDS[-1]], expected[: BOUNDS[-1]])
    assert (actual[BOUNDS[-1] :] == 0).all()


@pytest.mark.parametrize(("causal", "window", "softcap"), OPTIONS)
def test_gradcheck_reference(causal: bool, window: int | None, softcap: float | None) -> None:
    inputs = _inputs(7, 2, 1, 3, torch.float64)
    cu_seqlens = _cu_seqlens([0, 2, 2, 6])
    torch.autograd.gradcheck(
        lambda q, k, v: reference.packed_attention(q, k, v, cu_seqlens, causal, window, softcap, 0.7), inputs
    )


def test_errors_name_the_argument() -> None:
    x = torch.ones(4, 2, 8)
    cu_seqlens = _cu_seqlens([0, 4])
    with pytest.raises(ValueError, match=r"q: got shape \[4, 8\], expected \[tokens, q_heads, d\]"):
        packed_attention(x[:, 0], x, x, cu_seqlens)
    with pytest.raises(ValueError, match=r"k: got shape \[3, 2, 8\]"):
        packed_attention(x, x[:3], x, cu_seqlens)
    with pytest.raises(ValueError, match=r"v: got torch\.float64, expected the dtype of q"):
        packed_attention(x, x, x.double(), cu_seqlens)
    with pytest.raises(ValueError, match=r"v: got shape \[4, 1, 8\], expected the shape of k"):
        packed_attention(x, x, x[:, :1], cu_seqlens)
    with pytest.raises(ValueError, match="k: got 2 heads, expected a divisor of the 3 heads of q"):
        packed_attention(torch.ones(4, 3, 8), x, x, cu_seqlens)
    with pytest.raises(ValueError, match=r"cu_seqlens: got torch\.int64 of shape \[2\], expected int32"):
        packed_attention(x, x, x, cu_seqlens.long())
    with pytest.raises(ValueError, match="window: got 0, expected at least 1"):
        packed_attention(x, x, x, cu_seqlens, window=0)
    with pytest.raises(ValueError, match="softcap: got -1"):
        packed_attention(x, x, x, cu_seqlens, softcap=-1)


@pytest.mark.parametrize("bounds", [[1, 4], [0, 3, 2, 4], [0, 5]])
@pytest.mark.parametrize("backend", ["reference"])
def test_bad_cu_seqlens(bounds: list[int], backend: str) -> None:
    x = torch.ones(4, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens: got"):
        packed_attention(x, x, x, _cu_seqlens(bounds), backend=backend)
