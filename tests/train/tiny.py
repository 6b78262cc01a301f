"""A tiny llama checkpoint with a tokenizer, data for it, and recipes on them."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from forge_core.model import CausalLM, ModelConfig, save_model
from forge_core.recipe import Recipe
from tests.data.tiny import CHATML, SENTENCES, questions, tiny_backend, write_jsonl

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "initializer_range": 0.1,
}


def write_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A random model with its tokenizer, as a Hugging Face folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    torch.manual_seed(seed)
    save_model(CausalLM(ModelConfig.from_file(folder / "config.json")), folder)
    tiny_backend().save(str(folder / "tokenizer.json"))
    names = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "pad_token": "<|endoftext|>"}
    config = {**names, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_world(folder: Path) -> Path:
    """Model, domain data, general text and held-out sets in one folder."""
    write_model(folder / "base")
    write_jsonl(folder / "domain.jsonl", questions(40))
    write_jsonl(folder / "general.jsonl", [{"text": SENTENCES[i % 3] + f"Number {i}."} for i in range(30)])
    write_jsonl(folder / "domain-test.jsonl", questions(46)[40:])
    write_jsonl(folder / "general-test.jsonl", [{"text": SENTENCES[i % 3] + f"Other {i}."} for i in range(6)])
    return folder


def settings(world: Path, output_dir: Path, **training: Any) -> dict[str, Any]:
    """A mixed LoRA recipe of 6 steps of 3 packs of 96 tokens, as it stands in YAML."""
    return {
        "technique": "sft",
        "model": {"path": str(world / "base"), "dtype": "float32", "device": "cpu"},
        "output_dir": str(output_dir),
        "seed": 3,
        "lora": {"rank": 4, "alpha": 8},
        "data": {
            "customer": [{"name": "domain", "path": str(world / "domain.jsonl")}],
            "customer_percent": 60,
            "general": [{"category": "prose", "path": str(world / "general.jsonl"), "percent": 100}],
            "max_length": 96,
            "cache_dir": str(world / "cache"),
        },
        "training": {
            "max_steps": 6,
            "packs_per_step": 3,
            "learning_rate": 2e-3,
            "min_lr": 1e-4,
            "warmup_steps": 2,
            "save_steps": 2,
            **training,
        },
        "evaluation": {
            "every": 3,
            "sets": [
                {
                    "name": "answers",
                    "path": str(world / "domain-test.jsonl"),
                    "kind": "exact_match",
                    "max_new_tokens": 4,
                },
                {"name": "prose-test", "path": str(world / "general-test.jsonl")},
            ],
        },
    }


def recipe(world: Path, output_dir: Path, **training: Any) -> Recipe:
    return Recipe.model_validate(settings(world, output_dir, **training))


def write_recipe(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file
