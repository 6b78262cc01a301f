from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from forge_core.kernels import PackPlan, packed_attention, reference
from forge_core.kernels.gpu.attention_tiles import tile_lists
from tests.backends import Backend, backends
from tests.tolerance import check_op

BACKENDS = backends("packed_attention")
TRITON = [backend for backend in BACKENDS if backend.values[0].name == "triton"]
CPP = Backend("cpp", "cpu")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
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
    ([0, 90, 91, 200], 210, 6, 2, 17),
    ([0, 70], 70, 2, 1, 256),
    ([0, 150, 235], 235, 3, 3, 64),
]
LONG_PACKS = [([0, 200, 335], 335, 3, 3, 64), ([0, 1100, 1150], 1150, 2, 1, 16)]


def _inputs(tokens: int, q_heads: int, kv_heads: int, d: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, heads, d, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def _cu_seqlens(bounds: list[int]) -> Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def _check(inputs: list[Tensor], bounds: list[int], backend: Backend = CPP, **options: Any) -> None:
    plan = options.pop("plan", None)

    def attend(name: str) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            cu_seqlens = _cu_seqlens(bounds).to(q.device)
            return packed_attention(
                q, k, v, cu_seqlens, plan=plan if name != "reference" else None, backend=name, **options
            )

        return run

    check_op(attend(backend.name), attend("reference"), inputs, device=backend.device)


def _gradients(inputs: list[Tensor], bounds: list[int], backend: Backend = CPP, **options: Any) -> list[Tensor]:
    inputs = [x.detach().to(backend.device).requires_grad_() for x in inputs]
    out = packed_attention(*inputs, _cu_seqlens(bounds).to(backend.device), backend=backend.name, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", PACKS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference(backend: Backend, pack: tuple[list[int], int, int, int, int], dtype: torch.dtype) -> None:
    bounds, *sizes = pack
    _check(_inputs(*sizes, dtype), bounds, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pack", LONG_PACKS, ids=str)
@pytest.mark.parametrize("backend", [pytest.param(CPP, id="cpp"), *backends("packed_attention", gpu_only=True)])
def test_long_packs_match_reference(
    backend: Backend, pack: tuple[list[int], int, int, int, int], dtype: torch.dtype
) -> None:
    bounds, *sizes = pack
    _check(_inputs(*sizes, dtype), bounds, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (7, 1), (16, 1)])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("backend", backends("packed_attention", gpu_only=True))
def test_every_configuration_matches_reference(
    backend: Backend, d: int, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    inputs, bounds = _inputs(700, *heads, d, dtype), [0, 300, 310, 690]
    _check(inputs, bounds, backend)
    _check(inputs, bounds, backend, window=200, softcap=20.0)
    _check(inputs, bounds, backend, causal=False, window=250)


@pytest.mark.parametrize("sizes", [(50, 4, 1, 8), (50, 16, 1, 24)])
@pytest.mark.parametrize("backend", TRITON)
def test_float16_and_large_groups(backend: Backend, sizes: tuple[int, int, int, int]) -> None:
    _check(_inputs(*sizes, torch.float16), BOUNDS, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("causal", "window", "softcap"), OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_reference_with_options(
    backend: Backend, causal: bool, window: int | None, softcap: float | None, dtype: torch.dtype
) -> None:
    options = {"causal": causal, "window": window, "softcap": softcap}
    # The interpreter is slow: one of the two for each dtype.
    if backend.device != "cpu" or backend.name == "cpp" or dtype == torch.float32:
        plan = PackPlan(_cu_seqlens(BOUNDS).numpy())
        _check(_inputs(TOKENS, 4, 1, 7, dtype), BOUNDS, backend, scale=0.5, plan=plan, **options)
    if backend.device != "cpu" or backend.name == "cpp" or dtype == torch.bfloat16:
        _check(_inputs(130, 2, 1, 16, dtype), [0, 9, 120], backend, scale=-0.25, **options)


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 600), (False, 600)])
def test_long_documents_are_several_tasks(causal: bool, window: int | None) -> None:
    _check(_inputs(4300, 1, 1, 4, torch.float32), [0, 4200], causal=causal, window=window)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_a_fused_projection(backend: Backend, dtype: torch.dtype) -> None:
    qkv = torch.randn(24, 8, 10, dtype=dtype)
    bounds = [0, 7, 7, 22]
    rows, columns = qkv.transpose(0, 1).contiguous().split([4, 2, 2]), qkv.mT.contiguous().split([4, 2, 2], 2)
    _check([x.requires_grad_() for x in qkv.split([4, 2, 2], 1)], bounds, backend)
    _check([x.transpose(1, 2).requires_grad_() for x in columns], bounds, backend)
    _check([x.transpose(0, 1).requires_grad_() for x in rows], bounds, backend)


@pytest.mark.parametrize("backend", TRITON)
def test_tiles_without_edges(backend: Backend) -> None:
    _check(_inputs(384, 4, 2, 16, torch.bfloat16), [0, 128, 384], backend, causal=False)


@pytest.mark.parametrize(("planned", "dtype"), [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)])
@pytest.mark.parametrize(
    "backend", [*BACKENDS, Backend("reference", "cpu")], ids=lambda value: getattr(value, "name", value)
)
def test_rows_past_the_last_document_are_not_read(backend: Backend, planned: bool, dtype: torch.dtype) -> None:
    inputs = [x.detach().to(backend.device).requires_grad_() for x in _inputs(TOKENS, 4, 2, 8, dtype)]
    with torch.no_grad():
        for x in inputs:
            x[BOUNDS[-1] :] = torch.nan
    plan = PackPlan(_cu_seqlens(BOUNDS).numpy()) if planned else None
    out = packed_attention(*inputs, _cu_seqlens(BOUNDS).to(backend.device), plan=plan, backend=backend.name)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_stay_finite(backend: Backend) -> None:
    q, k, v = _inputs(80, 2, 1, 8, torch.float32)
    for x in _gradients([q, k, v], [0, 80], backend, scale=1e4):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("backend", TRITON)
def test_triton_repeats_bitwise_and_does_not_depend_on_the_plan(backend: Backend) -> None:
    inputs, bounds = _inputs(80, 4, 2, 16, torch.bfloat16), [0, 3, 70, 75]
    plan = PackPlan(_cu_seqlens(bounds).numpy())
    runs = [_gradients(inputs, bounds, backend, plan=p) for p in (None, plan, plan)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


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


@pytest.mark.parametrize("backend", TRITON)
def test_opcheck_triton(backend: Backend) -> None:
    q, k, v = (x.detach().to(backend.device).requires_grad_() for x in _inputs(20, 2, 1, 8, torch.float32))
    tiles = tile_lists(q, k, _cu_seqlens([0, 4, 4, 18]).to(backend.device), None, True, 9)
    options = (*tiles[1:], True, 9, 2.0, 0.3)
    op = torch.ops.forge_triton.packed_attention
    torch.library.opcheck(op.default, (q, k, v, tiles[0], *options), test_utils=OPCHECKS)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = op(q, k, v, tiles[0], *options)
    backward = torch.ops.forge_triton.packed_attention_backward
    torch.library.opcheck(backward.default, (torch.randn_like(q), q, k, v, out, lse, *options), test_utils=OPCHECKS)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_break(backend: Backend, planned: bool) -> None:
    inputs = [x.detach().to(backend.device).requires_grad_() for x in _inputs(24, 4, 2, 8, torch.float32)]
    plan = PackPlan(_cu_seqlens([0, 7, 7, 22]).numpy()) if planned else None
    cu_seqlens = _cu_seqlens([0, 7, 7, 22]).to(backend.device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, cu_seqlens, plan=plan, window=6, backend=backend.name) * 2

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    actual = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_activation_checkpointing(backend: Backend) -> None:
    inputs = [x.detach().to(backend.device).requires_grad_() for x in _inputs(24, 4, 2, 8, torch.float32)]
    cu_seqlens = _cu_seqlens([0, 7, 7, 22]).to(backend.device)
    expected = torch.autograd.grad(packed_attention(*inputs, cu_seqlens, backend=backend.name).square().sum(), inputs)
    out = checkpoint(packed_attention, *inputs, cu_seqlens, use_reentrant=False, backend=backend.name)
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


def test_triton_says_what_it_cannot_take() -> None:
    with pytest.raises(ValueError, match=r"triton: .*takes head dimensions up to 256, got 257"):
        packed_attention(*[torch.ones(4, 2, 257)] * 3, _cu_seqlens([0, 4]), backend="triton")


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
