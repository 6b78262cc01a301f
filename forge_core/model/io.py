"""Models in the Hugging Face layout: `config.json` and safetensors, in one file or in shards with an index."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from forge_core import atomic

from .config import ModelConfig
from .decoder import CausalLM
from .lora import PARTS, adaptable_linears, is_merged
from .quantize import Format, check_quantize, pack, packed_states, quantized_linears, unpack

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
_LISTED = 20  # names an error message spells out
# Files beside the weights that belong to the tokenizer or to generation; copied along by save_model.
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
_CLASS_NAMES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}  # fmt: skip
# Frequencies that early Llama checkpoints carry; they follow from the configuration.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    quantize: Format | None = None,
) -> CausalLM:
    """Read a model from a Hugging Face directory (`config.json` and safetensors).

    Weights that the checkpoint holds in 4 bits of bitsandbytes stay so, as with `quantize`.

    Args:
        path: the directory.
        dtype: bfloat16, float32, float16 or float64; the weights are converted to it.
        device: where the weights go.
        quantize: pack the weights of the linear layers but the head into 4 bits as they are read, "nf4" or "fp4" of
            bitsandbytes; `add_lora` then trains adapters on them (QLoRA).

    Returns:
        The model in training mode, every parameter requiring gradients; none of them where weights are in 4 bits.

    Raises:
        FileNotFoundError: no such directory, or a file is missing in it.
        ImportError: weights in 4 bits without bitsandbytes.
        ValueError: unsupported architecture, or tensors that are missing, extra or of another shape; all are listed.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"path: {path} is not a directory; expected a Hugging Face model directory")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, _DTYPES))}")
    config = ModelConfig.from_file(path / CONFIG)
    model = CausalLM(config, dtype=dtype, device="meta")
    files = _weight_files(path)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    linears = {f"{name}.weight" for name in adaptable_linears(model)}
    states = packed_states((name for names in files.values() for name in names), linears)
    scales = {scale for state in states.values() for scale in state}
    expected |= {name: torch.Size((expected[name].numel() // 2, 1)) for name in states}
    _check_tensors(path, expected, files, config, scales)
    device = torch.device(device)
    packed: dict[str, Format] = {}
    if quantize is not None:
        check_quantize(model, quantize, device)
        packed = dict.fromkeys(linears, quantize)
    if (packed or states) and dtype == torch.float64:
        raise ValueError("dtype: got torch.float64, expected bfloat16, float16 or float32 with weights in 4 bits")
    read: dict[str, Tensor] = {}  # packed weights, and their scales
    for file, names in files.items():
        with _open(path / file) as weights:
            for name in names:
                # copy=True: the tensor must not stay a view of the mapped file
                if name in states or name in scales:
                    read[name] = weights.get_tensor(name).to(device, copy=True)
                elif name in expected:
                    tensor = weights.get_tensor(name).to(device, dtype, copy=True)
                    _assign(model, name, pack(tensor, packed[name]) if name in packed else nn.Parameter(tensor))
    for name, state in states.items():
        _assign(model, name, unpack(read.pop(name), {scale: read.pop(scale) for scale in state}, dtype))
    if packed or states:
        model.requires_grad_(False)
    model.source = path.resolve()
    return model


def save_model(model: CausalLM, path: str | Path, *, max_shard_bytes: int = 5_000_000_000) -> None:
    """Write the model so that transformers (and `load_model`) read it back bit for bit.

    Writes `config.json` (as it was read, with the dtype of the weights), `model.safetensors` or shards with an index,
    and the tokenizer and generation files of the directory the model came from. Each file is written atomically, the
    weights first; weight files of an earlier model in the same directory are removed at the end.

    Args:
        model: a model without adapters, or with merged ones.
        path: the directory; created when missing.
        max_shard_bytes: above this size the weights are split.

    Raises:
        ValueError: the model has adapters that are not merged, or quantised weights.
    """
    if quantized_linears(model):
        raise ValueError(
            "model: its linear weights are in 4 bits, which are not written as a model; save the adapters with "
            "save_adapter, or make the weights dense first with dequantize_model(model)"
        )
    if model.lora_config is not None and not is_merged(model):
        raise ValueError(
            "model: its adapters are not merged, so the weights alone are the base model; "
            "call merge_lora(model) first, or save the adapters with save_adapter"
        )
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().contiguous()
        for name, tensor in model.state_dict().items()
        if not any(f".{part}." in name for part in PARTS)
    }
    shards = _shards(tensors, max_shard_bytes)
    written = {WEIGHTS} if len(shards) == 1 else {INDEX}
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with atomic.atomic_file(path / file) as temporary:
            save_file({name: tensors[name].cpu() for name in names}, temporary, metadata={"format": "pt"})
        written.add(file)
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        _write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    for name in _COMPANIONS:
        source = None if model.source is None else model.source / name
        if source is not None and source.is_file() and source.resolve() != (path / name).resolve():
            with atomic.atomic_file(path / name) as temporary:
                shutil.copyfile(source, temporary)
    _write_json(path / CONFIG, _saved_config(model.config, model.model.embed_tokens.weight.dtype))
    for entry in path.iterdir():
        if (entry.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(entry.name)) and entry.name not in written:
            entry.unlink()


def list_names(names: Iterable[str]) -> str:
    """Names for an error message: all of them, or the first twenty and how many more."""
    names = list(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _weight_files(path: Path) -> dict[str, list[str]]:
    """Weight files of the directory and the tensors to be read from each."""
    if (path / WEIGHTS).is_file():
        with _open(path / WEIGHTS) as weights:
            return {WEIGHTS: list(weights.keys())}
    if not (path / INDEX).is_file():
        others = sorted(entry.name for entry in path.glob("*.bin"))
        hint = f"; {list_names(others)}: convert such files to safetensors first" if others else ""
        raise FileNotFoundError(f"{path}: holds neither {WEIGHTS} nor {INDEX}{hint}")
    try:
        weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path / INDEX}: not an index of safetensors shards (no 'weight_map'): {error}") from error
    files: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, []).append(name)
    absent = [file for file in files if not (path / file).is_file()]
    if absent:
        raise FileNotFoundError(f"{path}: shards named in {INDEX} are missing: {list_names(absent)}")
    return files


def _check_tensors(
    path: Path,
    expected: Mapping[str, torch.Size],
    files: Mapping[str, list[str]],
    config: ModelConfig,
    scales: Collection[str],
) -> None:
    problems, extra, shapes, found = [], [], [], set()
    for file, names in files.items():
        with _open(path / file) as weights:
            present = set(weights.keys())
            absent = [name for name in names if name not in present]
            if absent:
                problems.append(f"{file} lacks what {INDEX} says it holds: {list_names(absent)}")
            for name in (name for name in names if name in present):
                found.add(name)
                if name in expected:
                    shape = weights.get_slice(name).get_shape()
                    if list(expected[name]) != shape:
                        shapes.append(f"{name} {shape} (expected {list(expected[name])})")
                elif name not in scales and not _DERIVED.fullmatch(name):
                    extra += [] if _is_tied_copy(path, files, name, config) else [name]
    missing = [name for name in expected if name not in found]
    problems += [f"missing: {list_names(missing)}"] if missing else []
    problems += [f"not part of this architecture: {list_names(sorted(extra))}"] if extra else []
    problems += [f"of another shape: {list_names(shapes)}"] if shapes else []
    if problems:
        raise ValueError(
            f"{path}: the tensors do not match its config.json (model_type {config.model_type}): " + "; ".join(problems)
        )


def _is_tied_copy(path: Path, files: Mapping[str, list[str]], name: str, config: ModelConfig) -> bool:
    """Whether `name` is the head of a tied model written out beside an equal embedding."""
    if name != "lm_head.weight" or not config.tie_word_embeddings:
        return False
    pair = []
    for wanted in (name, "model.embed_tokens.weight"):
        for file, names in files.items():
            if wanted in names:
                with _open(path / file) as weights:
                    pair.append(weights.get_tensor(wanted))
    if len(pair) == 2 and not torch.equal(*pair):
        raise ValueError(
            f"{path}: config.json says tie_word_embeddings, but lm_head.weight differs from model.embed_tokens.weight; "
            "set tie_word_embeddings to false if the head is its own"
        )
    return len(pair) == 2


def _open(file: Path) -> Any:
    """`safe_open` of a weight file.

    Raises:
        ValueError: the file is not in the safetensors format or is cut short.
    """
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file: {error}") from error


def _assign(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, leaf = name.rsplit(".", 1)
    setattr(model.get_submodule(owner), leaf, parameter)


def _shards(tensors: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names in order, cut where a shard would exceed `limit` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def _saved_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    raw = {key: value for key, value in config.raw.items() if key != "quantization_config"}
    raw.setdefault("architectures", [_CLASS_NAMES[config.model_type]])
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
    return raw


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    atomic.write_text(path, json.dumps(value, indent=2) + "\n")
