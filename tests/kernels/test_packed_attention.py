import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import PackPlan, packed_attention, reference
from tests.tolerance import check_op

DTYPES = [torch.float32, torch.bfloat16]
# A tail of 3 rows after the last document; zero-length documents at the start, inside and at the end.
BOUNDS = [0, 0, 1, 8, 8, 30, 47, 47]
TOKENS = 50
# causal, window, softcap
OPTIONS = [
    (True, None, None),
    (False, None, None),
    (True, 5, None),
    (False, 70, None),
    (True, None, 2.0),
    (False, 3, 0.5),
    (True, 1, 30.0),
]
# bounds, tokens, q_heads, kv_heads, d: nothing at all, no document, one row, odd and large d, a group that does not
# divide a tile, several tiles, a document of several backward tasks.
PACKS = [
    ([0], 0, 2, 1, 8),
    ([0, 0, 0], 0, 2, 2, 8),
    ([0], 5, 2, 1, 8),
    ([0, 1], 1, 1, 1, 1),
    (BOUNDS, TOKENS, 4, 2, 7),
    ([0, 130, 131, 300], 310, 6, 2, 17),
    ([0, 70], 70, 2, 1, 256),
    ([0, 200, 335], 335, 3, 3, 64),
    ([0, 1100, 1150], 1150, 2, 1, 16),
]


def _inputs(tokens: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def _cu_seqlens(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def _check(inputs: list[Tensor], bounds: list[int], **options) -> None:  # type: ignore[no-untyped-def]
    cu_seqlens = _cu_seqlens(bounds)
    plan = options.pop("plan", None)
    check_op(
        lambda q, k, v: packed_attention(q, k, v, cu_seqlens, plan=plan, backend="cpp", **options),
        lambda q, k, v: packed_attention(q, k, v, cu_seqlens, backend="reference", **options),
        inputs,
    )


def _gradients(inputs: list[Tensor], bounds: list[int], **options) -> list[Tensor]:  # type: ignore[no-untyped-def]
    out = packed_attention(*inputs, _cu_seqlens(bounds), **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", PACKS, ids=str)
def test_matches_reference(pack: tuple[list[int], int, int, int, int], dtype: torch.dtype) -> None:
    bounds, *sizes = pack
    _check(_inputs(*sizes, dtype), bounds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "window", "softcap"), OPTIONS)
def test_matches_reference_with_options(
    causal: bool, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    options = {"causal": causal, "window": window, "softcap": softcap}
    _check(_inputs(TOKENS, 4, 2, 7, dtype), BOUNDS, scale=0.5, **options)
    _check(_inputs(310, 2, 1, 16, dtype), [0, 9, 300], **options)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 600), (False, 600)])
def test_long_documents_are_several_tasks(causal: bool, window: int | None) -> None:
    _check(_inputs(4300, 1, 1, 4, torch.float32), [0, 4200], causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_a_fused_projection(dtype: torch.dtype) -> None:
    qkv = torch.randn(TOKENS, 8, 10, dtype=dtype)
    _check([x.requires_grad_() for x in qkv.split([4, 2, 2], 1)], BOUNDS)
    _check([x.transpose(1, 2).requires_grad_() for x in qkv.mT.contiguous().split([4, 2, 2], 2)], BOUNDS)
    _check([x.transpose(0, 1).requires_grad_() for x in qkv.transpose(0, 1).contiguous().split([4, 2, 2])], BOUNDS)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_rows_past_the_last_document_are_not_read(backend: str) -> None:
    inputs = _inputs(TOKENS, 4, 2, 8, torch.float32)
    with torch.no_grad():
        for x in inputs:
            x[BOUNDS[-1] :] = torch.nan
    out = packed_attention(*inputs, _cu_seqlens(BOUNDS), backend=backend)
    upstream = torch.ones_like(out)
    upstream[BOUNDS[-1] :] = torch.nan
    for x in [out, *torch.autograd.grad(out, inputs, upstream)]:
        assert torch.isfinite(x).all() and (x[BOUNDS[-1] :] == 0).all()


@pytest.mark.parametrize("q_tile", [1, 16, 64, 1000])
def test_plan(q_tile: int) -> None:
    bounds = [0, 0, 150, 151, 400]
    plan = PackPlan(_cu_seqlens(bounds).numpy(), q_tile=q_tile)
    _check(_inputs(410, 6, 2, 8, torch.float32), bounds, plan=plan, window=40)


@pytest.mark.parametrize(
    ("bounds", "got"),
    [([0, 5], "no tile with row 5"), ([0, 9], "rows 0 to 9 of document 0"), ([0, 4, 6], "rows 4 to 6 of document 1")],
)
def test_plan_of_other_documents_is_refused(bounds: list[int], got: str) -> None:
    plan = PackPlan(_cu_seqlens(bounds).numpy())
    with pytest.raises(Exception, match=f"plan: got {got}"):
        packed_attention(*_inputs(8, 2, 1, 4, torch.float32), _cu_seqlens([0, 6]), plan=plan)


def test_large_logits_stay_finite() -> None:
    q, k, v = _inputs(80, 2, 1, 8, torch.float32)
    for x in _gradients([q, k, v], [0, 80], scale=1e4):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeatable_bitwise_for_any_number_of_threads(dtype: torch.dtype) -> None:
    inputs, bounds = _inputs(1500, 4, 2, 16, dtype), [0, 3, 1203, 1490]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(_gradients(inputs, bounds))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("bounds", [BOUNDS, [0]])
def test_opcheck(bounds: list[int]) -> None:
    q, k, v = _inputs(TOKENS, 4, 2, 8, torch.float32)
    cu_seqlens = _cu_seqlens(bounds)
    tiles = torch.from_numpy(PackPlan(cu_seqlens.numpy()).forward)
    for argument in (None, tiles):
        torch.library.opcheck(
            torch.ops.forge.packed_attention.default, (q, k, v, cu_seqlens, argument, True, 0, 0.0, 0.3)
        )
    q, k, v = (x.detach() for x in (q, k, v))
    _, lse = torch.ops.forge.packed_attention(q, k, v, cu_seqlens, None, True, 9, 2.0, 0.3)
    torch.library.opcheck(
        torch.ops.forge.packed_attention_backward.default,
        (torch.randn_like(q), q, k, v, lse, cu_seqlens, True, 9, 2.0, 0.3),
    )


@pytest.mark.parametrize("planned", [False, True])
def test_compiles_without_graph_break(planned: bool) -> None:
    inputs = _inputs(TOKENS, 4, 2, 8, torch.float32)
    cu_seqlens = _cu_seqlens(BOUNDS)
    plan = PackPlan(cu_seqlens.numpy()) if planned else None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, cu_seqlens, plan=plan, window=6) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_activation_checkpointing() -> None:
    inputs, cu_seqlens = _inputs(TOKENS, 4, 2, 8, torch.float32), _cu_seqlens(BOUNDS)
    expected = torch.autograd.grad(packed_attention(*inputs, cu_seqlens).square().sum(), inputs)
    out = checkpoint(packed_attention, *inputs, cu_seqlens, use_reentrant=False)
    actual = torch.autograd.grad(out.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


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
@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_bad_cu_seqlens(bounds: list[int], backend: str) -> None:
    x = torch.ones(4, 2, 8)
    with pytest.raises((ValueError, RuntimeError), match="cu_seqlens: got"):
        packed_attention(x, x, x, _cu_seqlens(bounds), backend=backend)
