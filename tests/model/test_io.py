from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from forge_core.model import LoraConfig, add_lora, load_model, merge_lora, save_model

from .tiny import VARIANTS, save_peer


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a single-file model in place."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_saved_models_load_in_transformers_bit_equal(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    peer = save_peer(tmp_path / "in", name, dtype)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    model = load_model(tmp_path / "in", dtype=dtype)
    save_model(model, tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(peer) and again.dtype == dtype
    expected, actual = peer.state_dict(), again.state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)
    assert again.config.to_dict() | {"_name_or_path": ""} == peer.config.to_dict() | {"_name_or_path": ""}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["llama", "qwen3"])  # tied, untied
def test_shards_written_here_and_by_transformers(tmp_path: Path, name: str) -> None:
    peer = save_peer(tmp_path / "single", name)
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="50KB")
    model = load_model(tmp_path / "theirs", dtype=torch.float32)
    single = load_model(tmp_path / "single", dtype=torch.float32)
    save_model(model, tmp_path / "ours", max_shard_bytes=50_000)
    assert len(list((tmp_path / "ours").glob("model-*-of-*.safetensors"))) > 2
    ours = load_model(tmp_path / "ours", dtype=torch.float32)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    for key, value in single.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) and torch.equal(value, ours.state_dict()[key])
        assert torch.equal(value, again.state_dict()[key])
    save_model(model, tmp_path / "ours")  # over the sharded one
    assert sorted(entry.name for entry in (tmp_path / "ours").iterdir() if "model" in entry.name) == [
        "model.safetensors"
    ]


def test_loading_converts_and_keeps_nothing_mapped(tmp_path: Path) -> None:
    save_peer(tmp_path, "llama")
    model = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.model.norm.weight.clone()
    save_model(model, tmp_path)  # onto the files it came from
    assert torch.equal(before, model.model.norm.weight)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_mismatched_tensors_are_all_listed(tmp_path: Path) -> None:
    save_peer(tmp_path, "qwen3")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"], tensors["lm_head.weight"]
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 64)

    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=r"do not match its config\.json") as caught:
        load_model(tmp_path)
    message = str(caught.value)
    assert "missing: model.norm.weight, lm_head.weight" in message
    assert "not part of this architecture: model.layers.9.mlp.up_proj.weight" in message
    assert "model.layers.0.mlp.up_proj.weight [3, 64] (expected [80, 64])" in message


def test_a_tied_head_that_is_written_out_must_equal_the_embedding(tmp_path: Path) -> None:
    save_peer(tmp_path, "llama")
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert load_model(tmp_path).lm_head is None
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(ValueError, match=r"tie_word_embeddings, but lm_head.weight differs"):
        load_model(tmp_path)


def test_rotary_frequencies_in_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    save_peer(tmp_path, "llama")
    rewrite(tmp_path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    load_model(tmp_path)


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a directory"):
        load_model(tmp_path / "nowhere")
    peer = save_peer(tmp_path / "model", "llama")
    with pytest.raises(ValueError, match=r"dtype: got torch.int8, expected one of torch.bfloat16"):
        load_model(tmp_path / "model", dtype=torch.int8)
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file"):
        load_model(tmp_path / "model")
    weights.rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin: convert such files"):
        load_model(tmp_path / "model")
    peer.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    gone = sorted((tmp_path / "shards").glob("model-0*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=f"are missing: {gone.name}"):
        load_model(tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not an index of safetensors shards"):
        load_model(tmp_path / "shards")


def test_adapters_must_be_merged_before_the_model_is_saved(tmp_path: Path) -> None:
    save_peer(tmp_path / "in", "llama")
    model = load_model(tmp_path / "in", dtype=torch.float32)
    add_lora(model, LoraConfig(rank=2))
    torch.nn.init.ones_(model.model.layers[0].mlp.up_proj.lora_B.weight)
    with pytest.raises(ValueError, match=r"not merged.*merge_lora"):
        save_model(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge_lora(model)
    save_model(model, tmp_path / "out")
    merged = load_model(tmp_path / "out", dtype=torch.float32)
    assert merged.state_dict().keys() == load_model(tmp_path / "in").state_dict().keys()
    expected = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)
