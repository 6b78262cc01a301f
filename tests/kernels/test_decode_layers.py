from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from forge_core.kernels import DecodeLayer, DecodeLinear, DecodeStack, decode_layers
from tests.tolerance import check_op

pytestmark = pytest.mark.skipif(
    not torch.ops.forge.has_bf16_dot_product(), reason="this CPU (or FORGE_CPU_ISA) has no bfloat16 dot product"
)


@dataclass
class Case:
    """Two layers of these sizes, with these parts."""

    sequences: int = 5
    hidden: int = 48
    q_heads: int = 4
    kv_heads: int = 2
    d: int = 16
    inner: int = 70
    norms: tuple[str, ...] = ("pre_attention", "pre_mlp")
    qk_norm: str = "none"
    bias: bool = False
    rank: int = 0
    windows: tuple[int | None, int | None] = (None, None)
    options: dict[str, Any] = field(default_factory=dict)

    def sizes(self) -> dict[str, tuple[int, int]]:
        q, kv = self.q_heads * self.d, self.kv_heads * self.d
        h, inner = self.hidden, self.inner
        return {
            "q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q), "gate": (inner, h), "up": (inner, h),
            "down": (h, inner),
        }  # fmt: skip

    def qk_sizes(self) -> dict[str, int]:
        heads = {"q_norm": self.q_heads, "k_norm": self.kv_heads} if self.qk_norm == "projection" else {}
        return {} if self.qk_norm == "none" else {name: heads.get(name, 1) * self.d for name in ("q_norm", "k_norm")}

    def tensors(self) -> list[Tensor]:
        """x, tables, caches, then the parts of both layers in the order in which `stack` takes them."""
        torch.manual_seed(0)
        rows, capacity = self.sequences + 1, 40
        x = torch.randn(self.sequences, self.hidden).bfloat16()
        angles = torch.rand(2, capacity, self.d // 2) * 6
        caches = [torch.randn(rows, self.kv_heads, capacity, self.d).bfloat16() for _ in range(4)]
        parts = []
        for _ in range(2):
            parts += [(1 + 0.3 * torch.randn(self.hidden)).bfloat16() for _ in self.norms]
            parts += [(1 + 0.3 * torch.randn(size)).bfloat16() for size in self.qk_sizes().values()]
            for rows, columns in self.sizes().values():
                parts.append((torch.randn(rows, columns) / columns**0.5).bfloat16())
                parts += [torch.randn(rows).bfloat16()] * self.bias
                if self.rank:
                    parts.append((torch.randn(self.rank, columns) / columns**0.5).bfloat16())
                    parts.append((torch.randn(rows, self.rank) / self.rank**0.5).bfloat16())
        return [x, *(table for side in angles for table in (side.cos(), side.sin())), *caches, *parts]

    def stack(self, parts: list[Tensor]) -> DecodeStack:
        left = iter(parts)
        layers = []
        for index, window in enumerate(self.windows):
            norms = {name: next(left) for name in (*self.norms, *self.qk_sizes())}
            linears = {}
            for name in self.sizes():
                weight, bias = next(left), next(left) if self.bias else None
                adapter = (next(left), next(left)) if self.rank else (None, None)
                linears[name] = DecodeLinear(weight, bias, *adapter)
            layers.append(DecodeLayer(**linears, **norms, window=window, table=index))
        return DecodeStack(layers, q_heads=self.q_heads, **{"scale": self.d**-0.5, **self.options})

    def run(self, inputs: tuple[Tensor, ...], backend: str) -> tuple[Tensor, ...]:
        """Output and the changed caches."""
        x, tables, caches = inputs[0], inputs[1:5], [cache.clone() for cache in inputs[5:9]]
        positions = torch.arange(self.sequences) * 7 % 40
        keys, values = caches[:2], caches[2:]
        pairs = [(tables[0], tables[1]), (tables[2], tables[3])]
        y = decode_layers(x, positions, pairs, keys, values, self.stack(list(inputs[9:])), backend=backend)
        return (y, *keys, *values)


CASES = {
    "llama": Case(),
    "one sequence, nothing odd": Case(sequences=1, hidden=96, d=32, inner=192),
    "odd sizes": Case(sequences=7, hidden=51, d=10, q_heads=3, kv_heads=3, inner=33),
    "no norms": Case(norms=()),
    "norms behind": Case(norms=("post_attention", "post_mlp"), qk_norm="projection"),
    "norms before and behind, gelu, softcap, windows": Case(
        norms=("pre_attention", "post_attention", "pre_mlp", "post_mlp"),
        windows=(5, None),
        options={"activation": "gelu_tanh", "softcap": 2.0, "weight_offset": 1.0, "scale": 0.3},
    ),
    "norms of heads, biases, 18 sequences": Case(sequences=18, qk_norm="head", bias=True),
    "adapters, 35 sequences": Case(sequences=35, rank=5, bias=True),
    "adapters wider than a strip, 64 sequences": Case(sequences=64, rank=50),
    "more sequences than one pass": Case(sequences=67, d=64, q_heads=6),
}


@pytest.mark.parametrize("name", CASES)
def test_as_accurate_as_the_layers_in_torch(name: str) -> None:
    case = CASES[name]
    check_op(lambda *inputs: case.run(inputs, "cpp"), lambda *inputs: case.run(inputs, "reference"), case.tensors())


def test_same_for_any_number_of_threads_and_only_the_new_rows_of_the_cache_change() -> None:
    case = Case(sequences=9, rank=4)
    inputs = tuple(case.tensors())
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(case.run(inputs, "cpp"))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
    for cache, changed in zip(inputs[5:9], results[0][1:], strict=True):
        places = (cache != changed).any(dim=(1, 3)).nonzero().tolist()
        assert places == [[i, i * 7 % 40] for i in range(9)]


def test_opcheck() -> None:
    case = Case()
    x, *tables = case.tensors()[:5]
    stack = case.stack(case.tensors()[9:])
    keys, values = case.tensors()[5:7], case.tensors()[7:9]
    torch.library.opcheck(
        torch.ops.forge.decode_layers.default,
        (
            x, torch.arange(5), tables, keys, values, stack.tensors, stack.slots, stack.windows, stack.table_of_layer,
            stack.q_heads, stack.activation, stack.eps, stack.weight_offset, stack.scale, 0.0,
        ),
    )  # fmt: skip


def test_errors() -> None:
    case = Case()
    x, *tables = case.tensors()[:5]
    caches, stack = case.tensors()[5:9], case.stack(case.tensors()[9:])
    pairs = [tuple(tables[:2]), tuple(tables[2:])]
    arguments: dict[str, Any] = {
        "x": x, "positions": torch.arange(5), "tables": pairs, "keys": caches[:2], "values": caches[2:],
        "stack": stack,
    }  # fmt: skip
    for changes, message in [
        ({"x": x[0]}, r"x: got shape \[48\], expected \[sequences, hidden\]"),
        ({"positions": torch.arange(4)}, r"positions: got torch.int64 of shape \[4\], expected int64 \[5\]"),
        ({"keys": caches[:1]}, r"keys, values: got 1 and 2 entries, expected one per layer, 2"),
        ({"x": x.float(), "backend": "cpp"}, r"takes bfloat16 only"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_layers(**arguments | changes)
    wrong = case.tensors()[9:]
    wrong[2] = wrong[2][:, :-1].contiguous()
    for changes, message in [
        ({"positions": torch.tensor([0, 1, 2, 3, 40])}, r"positions: got 40 at index 4, expected 0 to 39"),
        ({"x": x[:, :-1], "backend": "cpp"}, r"pre_attention: got another shape, dtype or layout in layer 0"),
        ({"stack": case.stack(wrong)}, r"q: got another shape.* in layer 0, expected contiguous bfloat16 \[64, 48\]"),
        ({"keys": [cache[:3] for cache in caches[:2]]}, r"keys, values: got another shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            decode_layers(**arguments | changes)
