"""Rehearsal data: the base model's own answers to general prompts, written once before any training.

Good general data for a small model is scarce; what the base writes itself is by construction what it can already do,
and training on it holds the model there. Answers are sampled at temperature 1: on such answers the base has no expected
gradient, so they only resist change. Cooler samples read better, but are sharper than the model's own distribution and
pull it away from itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from forge_core.atomic import write_text

from .prompts import Prompt
from .rows import Row, question_row

MIN_ANSWER_CHARACTERS = 20


@dataclass(frozen=True)
class RehearsalOptions:
    """How the answers are sampled. All of it is part of the cache key."""

    prompts: int = 448
    max_new_tokens: int = 144
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


Generate = Callable[[Sequence[str], RehearsalOptions], list[str]]


def rehearsal_rows(
    prompts: Sequence[Prompt], options: RehearsalOptions, *, base: str, cache: Path, generate: Generate
) -> dict[str, list[Row]]:
    """Question/answer rows per category, generated on the first call and read from the cache afterwards.

    Args:
        prompts: the prompts in order; the first `options.prompts` are answered.
        options: sampling options.
        base: what identifies the base model (the hash of its file).
        cache: folder of the cached answers.
        generate: answers the prompts with the base model.
    """
    asked = list(prompts[: options.prompts])
    described = json.dumps([base, asdict(options), [prompt.text for prompt in asked]])
    path = cache / f"rehearsal-{hashlib.sha256(described.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        answers = generate([prompt.text for prompt in asked], options)
        cache.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(answers, ensure_ascii=False, indent=0))
    rows: dict[str, list[Row]] = {}
    for prompt, answer in zip(asked, json.loads(path.read_text(encoding="utf-8")), strict=True):
        text = whole_sentences(answer)
        if len(text) >= MIN_ANSWER_CHARACTERS:
            # Prompts of one form share their wording; the answer is what a row teaches.
            rows.setdefault(prompt.category, []).append(question_row(prompt.text, text, content=text))
    return rows


def whole_sentences(answer: str) -> str:
    """The answer up to its last finished sentence or line, so that a cut-off answer does not teach cutting off."""
    text = answer.strip()
    if re.search(r"[.!?:)\]}|`\"*]$", text):
        return text
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s)|(?=\n)", text)]
    return text[: ends[-1]].strip() if ends else ""
