from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from forge_core.model import LoraConfig, adapter_parameters, add_lora, load_model, merge_lora
from forge_core.model.sampling import choose_tokens

from .tiny import VARIANTS, documents, save_peer

LENGTHS = (5, 23, 1, 40)
NEW = 24


def prompts() -> list[list[int]]:
    input_ids, cu_seqlens = documents(*LENGTHS)
    return [
        input_ids[start:end].tolist()
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
    ]


def greedy_in_transformers(model: Any, prompt: list[int], count: int = NEW) -> list[int]:
    input_ids = torch.tensor(prompt)[None]
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "attention_mask": input_ids * 0 + 1}
    return model.generate(input_ids, max_new_tokens=count, **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_transformers_token_for_token(tmp_path: Path, name: str) -> None:
    peer = save_peer(tmp_path, name)
    model = load_model(tmp_path, dtype=torch.float32)
    expected = [greedy_in_transformers(peer, prompt) for prompt in prompts()]
    assert len({token for tokens in expected for token in tokens}) > 10  # the tokens vary, so agreement means something
    assert model.generate(prompts(), max_new_tokens=NEW) == expected
    assert model.generate(prompts(), max_new_tokens=NEW, batch_size=3) == expected  # the last one waits for a free row


def test_stops_cut_and_make_room(tmp_path: Path) -> None:
    save_peer(tmp_path, "mistral")
    model = load_model(tmp_path, dtype=torch.float32)
    many = prompts() * 3
    full = model.generate(many, max_new_tokens=NEW)

    def cut(tokens: list[int], stops: list[list[int]]) -> list[int]:
        for end in range(1, len(tokens) + 1):
            matches = [stop for stop in stops if tokens[:end][-len(stop) :] == stop]
            if matches:
                return tokens[: end - max(map(len, matches))]
        return tokens

    sequence = full[1][8:10]
    stop: list[Any] = [full[0][3], sequence, (full[3][17],), [full[2][5], full[2][6], full[2][7]]]
    stops = [[entry] if isinstance(entry, int) else list(entry) for entry in stop]
    expected = [cut(tokens, stops) for tokens in full]
    assert len({len(tokens) for tokens in expected}) > 2
    for batch_size in (1, 2, 5, 64):
        assert model.generate(many, max_new_tokens=NEW, stop=stop, batch_size=batch_size) == expected
    assert model.generate([], max_new_tokens=3) == []


def test_of_two_stops_that_match_the_longer_is_cut_off(tmp_path: Path) -> None:
    save_peer(tmp_path, "llama")
    model = load_model(tmp_path, dtype=torch.float32)
    prompt = prompts()[1]
    tokens = model.generate([prompt], max_new_tokens=NEW)[0]
    end = next(i for i in range(1, NEW) if tokens[i] not in tokens[:i])
    assert model.generate([prompt], max_new_tokens=NEW, stop=[tokens[end], tokens[end - 1 : end + 1]]) == [
        tokens[: end - 1]
    ]


def test_a_stop_sequence_inside_the_prompt_does_not_count(tmp_path: Path) -> None:
    save_peer(tmp_path, "llama")
    model = load_model(tmp_path, dtype=torch.float32)
    prompt = prompts()[1]
    first = model.generate([prompt], max_new_tokens=2)[0]
    assert model.generate([prompt], max_new_tokens=2, stop=[[prompt[-1], first[0]]])[0] == first


def test_drawing_depends_on_the_seed_and_the_prompt_alone(tmp_path: Path) -> None:
    save_peer(tmp_path, "llama")
    model = load_model(tmp_path, dtype=torch.float64)
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "seed": 4}
    first = model.generate(prompts(), **settings)
    assert first == model.generate(prompts(), batch_size=2, **settings)
    assert first != model.generate(prompts(), **{**settings, "seed": 5})
    same_prompt = model.generate([prompts()[0]] * 4, **settings)
    assert len({tuple(tokens) for tokens in same_prompt}) == 4
    assert model.generate(prompts(), **{**settings, "top_k": 1}) == model.generate(prompts(), max_new_tokens=12)


def test_adapters_act_in_generation(tmp_path: Path) -> None:
    save_peer(tmp_path, "qwen2")
    model = load_model(tmp_path, dtype=torch.float32)
    base = model.generate(prompts(), max_new_tokens=NEW)
    add_lora(model, LoraConfig(rank=4, dropout=0.5))
    for parameter in adapter_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    adapted = model.generate(prompts(), max_new_tokens=NEW)
    with model.adapters_disabled():
        assert model.generate(prompts(), max_new_tokens=NEW) == base
    merge_lora(model)
    assert model.generate(prompts(), max_new_tokens=NEW) == adapted != base


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 0}, 6),
        ({"temperature": 0.5, "top_p": 1.0, "top_k": 0}, 6),
        ({"temperature": 1.0, "top_p": 0.75, "top_k": 0}, 3),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 2}, 2),
        ({"temperature": 1.0, "top_p": 0.6, "top_k": 4}, 2),
    ],
)
def test_draws_follow_the_distribution(settings: dict[str, Any], kept: int) -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.2, 0.15, 0.1 - 1e-6], dtype=torch.float64)
    expected = probabilities ** (1 / settings["temperature"])
    order = expected.argsort(descending=True)
    expected[order[kept:]] = 0
    expected /= expected.sum()
    draws = 200_000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws  # evenly spread: counts are exact to one draw
    tokens = choose_tokens(probabilities.log().expand(draws, -1), uniform, **settings)
    counts = torch.bincount(tokens, minlength=6) / draws
    torch.testing.assert_close(counts.double(), expected, atol=2 / draws, rtol=0)


def test_top_p_looks_beyond_its_first_candidates() -> None:
    logits = torch.zeros(2, 5000)  # flat: the nucleus holds thousands of tokens
    uniform = torch.tensor([0.0, 0.999999], dtype=torch.float64)
    tokens = choose_tokens(logits, uniform, temperature=1.0, top_p=0.9, top_k=0)
    ranks = torch.sort(logits, dim=-1, descending=True).indices
    assert tokens[0] == ranks[0, 0]
    assert (ranks[1] == tokens[1]).nonzero().item() in range(4495, 4505)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\]: empty"),
        ({"prompts": [[1, 97]]}, r"prompts\[0\]: token ids must lie in 0..96, got 1..97"),
        ({"prompts": [[1] * 500]}, r"prompts\[0\]: 500 tokens and max_new_tokens = 24 exceed .* = 512"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"stop": [[]]}, "stop: got an empty sequence"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    save_peer(tmp_path, "llama")
    arguments: dict[str, Any] = {"prompts": [[1, 2]], "max_new_tokens": NEW, **changes}
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, dtype=torch.float32).generate(**arguments)
