"""DoRA in the model: against PEFT in value and gradient, merged, and in its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from forge_core.model import (
    CausalLM,
    LoraConfig,
    adapter_parameters,
    add_lora,
    load_adapter,
    load_model,
    merge_lora,
    remove_lora,
    save_adapter,
    save_model,
    unmerge_lora,
)
from forge_core.model.cache import KVCache
from forge_core.model.step import DecodeStep, _stack

from .tiny import documents, relative_error, save_peer

PACK = documents(13, 5)
CONFIG = LoraConfig(rank=4, alpha=6, use_dora=True)


def fill(model: CausalLM) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in adapter_parameters(model).items():
        if "magnitude" in name:
            parameter.data *= 0.5 + torch.rand(parameter.shape, generator=generator)
        else:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)


def adapted(folder: Path, dtype: torch.dtype = torch.float32, name: str = "qwen2") -> tuple[CausalLM, Any]:
    peer = save_peer(folder / "base", name)
    model = load_model(folder / "base", dtype=dtype)
    add_lora(model, CONFIG)
    return model, peer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_adapters_change_nothing(tmp_path: Path, dtype: torch.dtype) -> None:
    model, _ = adapted(tmp_path, dtype, "llama3-rope")  # without biases, which DoRA adds after y is rounded
    magnitudes = {name: p for name, p in adapter_parameters(model).items() if "magnitude" in name}
    assert len(magnitudes) * 3 == len(adapter_parameters(model))
    assert all(p.requires_grad and p.dtype == torch.float32 and p.dim() == 1 for p in magnitudes.values())
    after = model(*PACK)
    with model.adapters_disabled():
        assert torch.equal(after, model(*PACK))
    remove_lora(model)
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["qwen2", "gemma3"])
def test_gradients_equal_those_of_peft(tmp_path: Path, name: str) -> None:
    model, peer = adapted(tmp_path, name=name)
    fill(model)
    save_adapter(model, tmp_path / "adapter")
    wrapped = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter", is_trainable=True)
    ours = model.logits(model.train()(*PACK))
    theirs = torch.cat([wrapped.train()(ids[None]).logits[0] for ids in PACK[0].split([13, 5])])
    assert relative_error(ours, theirs) < 1e-5
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    (ours * direction).sum().backward()
    (theirs * direction).sum().backward()
    expected = {key: p.grad for key, p in wrapped.named_parameters() if p.requires_grad}
    parameters = adapter_parameters(model)
    assert len(expected) == len(parameters)
    for key, parameter in parameters.items():
        peers = expected["base_model.model." + key.replace(".weight", ".default.weight")]
        assert parameter.grad is not None and relative_error(parameter.grad, peers) < 1e-4, key


def test_merged_and_back(tmp_path: Path) -> None:
    model, peer = adapted(tmp_path)
    fill(model)
    model.eval()
    expected, base = model(*PACK), model.model.layers[0].self_attn.q_proj.weight.clone()
    merge_lora(model)
    assert relative_error(model(*PACK), expected) < 1e-5
    save_model(model, tmp_path / "merged")
    assert relative_error(load_model(tmp_path / "merged", dtype=torch.float32)(*PACK), expected) < 1e-5
    unmerge_lora(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, base) and torch.equal(model(*PACK), expected)
    save_adapter(model, tmp_path / "adapter")
    merged = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").merge_and_unload()
    merge_lora(model)
    assert relative_error(model.model.layers[0].mlp.up_proj.weight, merged.model.layers[0].mlp.up_proj.weight) < 1e-5


def test_generation_takes_the_magnitudes(tmp_path: Path) -> None:
    model, _ = adapted(tmp_path, torch.bfloat16)
    fill(model)
    model.eval()
    prompt = PACK[0][:5].tolist()
    new = model.generate([prompt], max_new_tokens=1)[0][0]
    logits = model.logits(model(torch.tensor(prompt), torch.tensor([0, 5], dtype=torch.int32)))[-1]
    assert logits[new] >= logits.max() - 2**-5 * logits.abs().max()
    cache = KVCache(model.config, 1, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert DecodeStep(model, cache).stack is None  # one op for all layers, without magnitudes
    merge_lora(model)
    assert (DecodeStep(model, cache).stack is None) == bool(_stack(model).not_supported_reasons)


def test_files(tmp_path: Path) -> None:
    first, _ = adapted(tmp_path)
    fill(first)
    save_adapter(first, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    assert sum(key.endswith(".lora_magnitude_vector") for key in tensors) * 3 == len(tensors)
    second = load_model(tmp_path / "base", dtype=torch.float32)
    load_adapter(second, tmp_path / "adapter")
    assert second.lora_config is not None and second.lora_config.use_dora
    assert torch.equal(first.eval()(*PACK), second.eval()(*PACK))
    one = next(key for key in tensors if "magnitude" in key)
    for changed, message in (
        ({one: tensors[one][1:].clone()}, r"magnitude \[\d+\] \(expected"),
        ({one: None}, "modules without lora_magnitude_vector, with use_dora"),
    ):
        save_file({k: v for k, v in {**tensors, **changed}.items() if v is not None}, weights)
        with pytest.raises(ValueError, match=message):
            load_adapter(load_model(tmp_path / "base", dtype=torch.float32), tmp_path / "adapter")
