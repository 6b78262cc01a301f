"""A base in 4 bits: the dequantised model in value and gradient, its adapters, its files, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from forge_core.model import (
    CausalLM,
    LoraConfig,
    adapter_parameters,
    add_lora,
    dequantize_model,
    load_adapter,
    load_model,
    merge_lora,
    save_adapter,
    save_model,
)
from forge_core.model.lora import adaptable_linears
from forge_core.model.quantize import check_full_rank, is_packed, quantized_linears

from .tiny import documents, relative_error, save_peer, transformers_logits

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

PACK = documents(13, 5)
CONFIG = LoraConfig(rank=4, alpha=6)
WIDTH = {"intermediate_size": 128}  # rows of whole blocks


def base(folder: Path, name: str = "llama", **options: Any) -> CausalLM:
    if not (folder / "base").exists():
        save_peer(folder / "base", name, **WIDTH)
    return load_model(folder / "base", **options)


def with_adapters(model: CausalLM, config: LoraConfig = CONFIG) -> CausalLM:
    add_lora(model, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(model).items():
        if "magnitude" not in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def values_and_gradients(model: CausalLM) -> list[Tensor]:
    hidden = model(*PACK)
    (hidden.float() ** 2).sum().backward()
    return [hidden.detach(), *(p.grad for p in adapter_parameters(model).values() if p.grad is not None)]


@pytest.mark.parametrize("quantize", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "config", [CONFIG, LoraConfig(rank=4, use_dora=True), LoraConfig(rank=4, target_modules=["v_proj"])]
)
def test_equals_the_dequantised_model(tmp_path: Path, quantize: Any, dtype: torch.dtype, config: LoraConfig) -> None:
    packed = base(tmp_path, dtype=dtype, quantize=quantize)
    assert quantized_linears(packed) == list(adaptable_linears(packed))
    assert not any(p.requires_grad for p in packed.parameters())
    dense = base(tmp_path, dtype=dtype, quantize=quantize)
    dequantize_model(dense)
    assert not quantized_linears(dense)
    original = base(tmp_path, dtype=dtype)
    for name, linear in adaptable_linears(dense).items():
        weight = adaptable_linears(original)[name].weight
        assert linear.weight.dtype == dtype and 0 < (linear.weight - weight).norm() < 0.2 * weight.norm()

    with torch.no_grad():  # the base alone
        assert torch.equal(packed(*PACK), dense(*PACK))
    results = [values_and_gradients(with_adapters(model, config)) for model in (packed, dense)]
    assert len(results[0]) == 1 + len(adapter_parameters(packed))
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("double", [True, False])
def test_reads_what_transformers_packed(tmp_path: Path, double: bool) -> None:
    base(tmp_path)
    options = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=options, dtype=torch.bfloat16, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "packed", max_shard_size="20KB")  # scales apart from their weights
    packed = load_model(tmp_path / "packed")
    assert quantized_linears(packed) == list(adaptable_linears(packed))
    assert not any(p.requires_grad for p in packed.parameters())
    with torch.no_grad():
        assert relative_error(packed.logits(packed(*PACK)), transformers_logits(theirs, *PACK)) < 0.03
        if double:
            assert torch.equal(packed(*PACK), base(tmp_path, quantize="nf4")(*PACK))
    assert len(values_and_gradients(with_adapters(packed))) > 1
    with pytest.raises(ValueError, match="in 4 bits already; leave quantize out"):
        load_model(tmp_path / "packed", quantize="nf4")
    with pytest.raises(ValueError, match=r"float64, expected .* with weights in 4 bits"):
        load_model(tmp_path / "packed", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"lora: got null, expected adapters, .* in 4 bits"):
        check_full_rank(packed.config)
    dense = load_model(tmp_path / "packed")
    dequantize_model(dense)
    save_model(dense, tmp_path / "dense")
    assert torch.equal(load_model(tmp_path / "dense")(*PACK), dense(*PACK))


def test_packed_weights_take_half_a_byte(tmp_path: Path) -> None:
    linear = base(tmp_path, quantize="nf4").get_submodule("model.layers.0.mlp.up_proj")
    assert linear.weight.nbytes == linear.in_features * linear.out_features // 2


def test_adapters_load_on_packed_and_dense_bases(tmp_path: Path) -> None:
    model = with_adapters(base(tmp_path, quantize="nf4"))
    save_adapter(model, tmp_path / "adapter")
    again = base(tmp_path, quantize="nf4")
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(model(*PACK), again(*PACK))
    dense = base(tmp_path)
    load_adapter(dense, tmp_path / "adapter")
    assert (dense(*PACK) - model(*PACK)).norm() < 0.5 * model(*PACK).norm()


def test_generates_what_the_dequantised_model_does(tmp_path: Path) -> None:
    packed = with_adapters(base(tmp_path, dtype=torch.float32, quantize="nf4")).eval()
    dense = with_adapters(base(tmp_path, dtype=torch.float32, quantize="nf4")).eval()
    dequantize_model(dense)
    prompts = [[3, 14, 15], [9, 2]]
    assert packed.generate(prompts, max_new_tokens=6) == dense.generate(prompts, max_new_tokens=6)
    assert all(is_packed(linear.weight) for linear in adaptable_linears(packed).values())
    bf16 = with_adapters(base(tmp_path, quantize="nf4")).eval()
    assert [len(ids) for ids in bf16.generate(prompts, max_new_tokens=3)] == [3, 3]


def test_merges_and_saves_only_after_dequantising(tmp_path: Path) -> None:
    model = with_adapters(base(tmp_path, dtype=torch.float32, quantize="nf4"))
    expected = model(*PACK)
    with pytest.raises(ValueError, match=r"4-bit weights, which would round .* dequantize_model"):
        merge_lora(model)
    with pytest.raises(ValueError, match=r"in 4 bits.* save_adapter, or .* dequantize_model"):
        save_model(model, tmp_path / "merged")
    dequantize_model(model)
    merge_lora(model)
    save_model(model, tmp_path / "merged")
    merged = load_model(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(merged(*PACK), expected, rtol=1e-4, atol=1e-4)


def test_refuses_what_cannot_be_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="quantize: got 'int4', expected one of nf4, fp4"):
        base(tmp_path, quantize="int4")
    save_peer(tmp_path / "narrow", "llama")  # rows of 80
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj has rows of 80, no multiple of the block of 64"):
        load_model(tmp_path / "narrow", quantize="nf4")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        base(tmp_path, quantize="nf4")
