"""Loss and exact match of named sets, and the words about what was forgotten."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from forge_core.data import Conversation, Message, Tokenizer, build_token_store
from forge_core.evaluate import (
    compare_with_base,
    evaluate_exact_match,
    evaluate_loss,
    forgetting_summary,
    loss_change,
)
from forge_core.model import CausalLM, load_model
from forge_core.recipe import Recipe
from tests.data.tiny import write_jsonl
from tests.train.tiny import recipe, settings, write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model(world: Path) -> CausalLM:
    return load_model(world / "base", dtype=torch.float32)


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(world / "base")


def by_hand(model: CausalLM, tokenizer: Tokenizer, texts: list[str]) -> tuple[float, int]:
    """Mean loss of each text alone, through the logits."""
    losses = []
    for ids in tokenizer.encode_documents(texts):
        tokens = torch.tensor(ids)
        with torch.no_grad():
            hidden = model(tokens, torch.tensor([0, len(ids)], dtype=torch.int32))
            losses.append(F.cross_entropy(model.logits(hidden)[:-1].double(), tokens[1:], reduction="none"))
    joined = torch.cat(losses)
    return float(joined.mean()), joined.numel()


@pytest.mark.parametrize("limit", [None, 2])
def test_loss_is_the_mean_over_tokens_of_documents_alone(
    model: CausalLM, tokenizer: Tokenizer, tmp_path: Path, limit: int | None
) -> None:
    texts = ["One two three.", "The code of cholera is A00, doctor.", "Ten."]
    rows = [{"text": text, "weight": 1.0 + i} for i, text in enumerate(texts)]
    store = build_token_store(write_jsonl(tmp_path / "t.jsonl", rows), tokenizer, max_length=64, cache_dir=tmp_path)
    nll, tokens = by_hand(model, tokenizer, texts[:limit])
    model.train()
    result = evaluate_loss(model, store, budget=64, limit=limit)
    assert result["tokens"] == tokens
    assert result["nll"] == pytest.approx(nll, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert evaluate_loss(model, store, budget=200, limit=limit)["nll"] == pytest.approx(nll, rel=1e-5)
    assert model.training


class Answering:
    """Stands for a model that gives these answers."""

    def __init__(self, tokenizer: Tokenizer, answers: list[str]) -> None:
        self.training = True
        self.prompts: list[str] = []
        self._tokenizer, self._answers = tokenizer, answers

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def eval(self) -> None:
        self.training = False

    def generate(self, prompts: list[list[int]], **options: Any) -> list[list[int]]:
        assert not self.training
        assert options["max_new_tokens"] == 9
        assert options["stop"] == self._tokenizer.stop_ids
        self.prompts = [self._tokenizer.decode(prompt) for prompt in prompts]
        return [self._tokenizer.encode(answer) for answer in self._answers]


def test_exact_match_compares_stripped_text(tokenizer: Tokenizer) -> None:
    conversations = [
        Conversation([Message("user", f"Q{i}"), Message("assistant", answer)], "t.jsonl", i + 1)
        for i, answer in enumerate(["It is A00.", " ten ", "Fox", "dog"])
    ]
    model: Any = Answering(tokenizer, ["It is A00.\n", "ten", "fox", "dogs"])
    result = evaluate_exact_match(model, tokenizer, conversations, max_new_tokens=9)
    assert model.prompts[0].endswith("<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n")
    assert (result["correct"], result["quasi_correct"], result["total"]) == (2, 3, 4)
    assert (result["accuracy"], result["quasi_accuracy"]) == (0.5, 0.75)
    last = result["predictions"][3]
    assert (last["file"], last["line"], last["reference"], last["prediction"]) == ("t.jsonl", 4, "dog", "dogs")
    assert [item["correct"] for item in result["predictions"]] == [True, True, False, False]
    assert model.training


def test_exact_match_with_a_real_model(model: CausalLM, tokenizer: Tokenizer) -> None:
    conversation = Conversation([Message("user", "One two"), Message("assistant", "three")], "t.jsonl", 1)
    result = evaluate_exact_match(model, tokenizer, [conversation] * 3, max_new_tokens=4, batch_size=2)
    assert result["total"] == 3
    assert len({item["prediction"] for item in result["predictions"]}) == 1


def test_exact_match_needs_a_reference(model: CausalLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"x.jsonl:3: got the roles \['user'\]"):
        evaluate_exact_match(model, tokenizer, [Conversation([Message("user", "Q")], "x.jsonl", 3)], max_new_tokens=1)
    with pytest.raises(ValueError, match="got none"):
        evaluate_exact_match(model, tokenizer, [], max_new_tokens=1)


def loss_result(nll: float, role: str = "general") -> dict[str, Any]:
    return {"kind": "loss", "role": role, "nll": nll}


def test_summary_says_what_was_gained_and_lost() -> None:
    answers = {"kind": "exact_match", "role": "domain", "accuracy": 0.09}
    base = {"austen": loss_result(3.73), "mmlu": loss_result(2.456), "icd": answers}
    tuned = {"austen": loss_result(3.75), "mmlu": loss_result(2.835), "icd": {**answers, "accuracy": 0.91}}
    lines = forgetting_summary(base, tuned)
    assert lines[0] == "icd: accuracy 9.0 % -> 91.0 % (+82.0 points)"
    assert lines[1] == "austen: loss 3.730 -> 3.750 (+0.5 %), kept"
    assert lines[2] == "mmlu: loss 2.456 -> 2.835 (+15.4 %), forgotten"
    assert lines[3].startswith("General ability was lost: the loss on mmlu rose by 15.4 %. Lower data.customer_percent")
    assert loss_change(base["mmlu"], tuned["mmlu"]) == pytest.approx(15.43, abs=0.01)


@pytest.mark.parametrize(("tuned", "word"), [(1.9, "improved"), (2.0, "kept"), (2.05, "a little forgotten")])
def test_verdicts(tuned: float, word: str) -> None:
    lines = forgetting_summary({"a": loss_result(2.0)}, {"a": loss_result(tuned)})
    assert lines[0].endswith(word)
    assert lines[1].startswith("General ability is kept" if tuned < 2.02 else "General ability was lost")


def test_without_general_sets_there_is_no_verdict() -> None:
    assert forgetting_summary({"a": loss_result(2.0, "domain")}, {"a": loss_result(1.0, "domain"), "b": {}}) == [
        "a: loss 2.000 -> 1.000 (-50.0 %)"
    ]


def test_nothing_to_compare(world: Path, tmp_path: Path) -> None:
    content = settings(world, tmp_path)
    content["evaluation"] = {"sets": []}
    with pytest.raises(ValueError, match=r"evaluation.sets: the recipe lists none"):
        compare_with_base(Recipe.model_validate(content))


def test_the_base_alone(world: Path, tmp_path: Path) -> None:
    results = compare_with_base(recipe(world, tmp_path))
    assert list(results) == ["base"]
    assert list(results["base"]) == ["answers", "prose-test"]
