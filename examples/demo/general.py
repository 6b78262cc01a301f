"""General data from public packages and Python itself: what the mix trains on, and what is only measured."""

from __future__ import annotations

import hashlib
import json
import pydoc_data.topics
import random
import re
from collections.abc import Mapping, Sequence

import reasoning_gym

from .rows import Row, question_row, text_row

MIN_PARAGRAPH_CHARACTERS = 80
PROSE_CHARACTERS = 900  # about 200 tokens a row
PROSE_HELD_OUT = 30
CIVICS_HELD_OUT = 20
MATHS_TRAIN_PER_TASK = 40
MATHS_HELD_OUT_PER_TASK = 5
MMLU_PER_SUBJECT = 2
MMLU_MAX_WORDS = 220

# Settings that a small model can cope with; the defaults of these generators are far above it.
MATHS_TASKS: Mapping[str, Mapping[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
    "letter_counting": {"min_words": 4, "max_words": 8},
    "leg_counting": {"min_animals": 1, "max_animals": 2},
    "family_relationships": {},
    "simple_equations": {"min_terms": 2, "max_terms": 2},
}
_SEED_STRIDE = 1_000_000  # item i of a generator draws from seed + i: nearby seeds would share nearly all items


def prose(topics: Mapping[str, str], *, seed: int) -> tuple[list[Row], list[Row]]:
    """Paragraphs of Python's own reference documentation as (training, held-out) text rows, split by topic.

    Tables, grammar, code and lists are left out: what stays is ordinary technical prose.
    """
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    held_out: list[Row] = []
    train: list[Row] = []
    for name in names:
        rows = [text_row(text) for text in _windows(_paragraphs(topics[name]))]
        (held_out if len(held_out) < PROSE_HELD_OUT else train).extend(rows)
    return train, held_out[:PROSE_HELD_OUT]


def python_topics() -> Mapping[str, str]:
    """The documentation topics that every Python installation carries."""
    return pydoc_data.topics.topics


def _paragraphs(text: str) -> list[str]:
    paragraphs = []
    for block in re.split(r"\n\s*\n", text):
        prose_like = re.match(r'[A-Z"]', block) and block.rstrip().endswith(".")
        if prose_like and "::=" not in block and not re.search(r"\n {2}|\n[*=-]{2}| {3}", block):
            paragraph = " ".join(block.split())
            if len(paragraph) >= MIN_PARAGRAPH_CHARACTERS:
                paragraphs.append(paragraph)
    return paragraphs


def _windows(paragraphs: Sequence[str]) -> list[str]:
    windows: list[str] = []
    for paragraph in paragraphs:
        if windows and len(windows[-1]) + len(paragraph) < PROSE_CHARACTERS:
            windows[-1] += "\n\n" + paragraph
        else:
            windows.append(paragraph)
    return windows


def civics(questions: bytes, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Civics questions with an answer in a sentence or two, as (training, held-out) rows."""
    rows = []
    for item in json.loads(questions):
        answer = item["answers"][0]
        if "varies" in answer.casefold():  # depends on where one lives
            continue
        sentence = answer[0].upper() + answer[1:] + ("" if answer.endswith(".") else ".")
        rows.append(question_row(item["question"], f"{sentence} {item['context']}"))
    random.Random(seed).shuffle(rows)
    return rows[CIVICS_HELD_OUT:], rows[:CIVICS_HELD_OUT]


def maths_and_logic(*, seed: int) -> tuple[list[Row], list[Row]]:
    """Short generated exercises with exact answers, as (training, held-out) rows without a repeated question."""
    train: list[Row] = []
    held_out: list[Row] = []
    for number, (task, options) in enumerate(sorted(MATHS_TASKS.items())):
        wanted = MATHS_TRAIN_PER_TASK + MATHS_HELD_OUT_PER_TASK
        start = seed + _SEED_STRIDE * (number + 1)
        dataset = reasoning_gym.create_dataset(task, seed=start, size=2 * wanted, **options)
        unique = {item["question"].strip(): item["answer"].strip() for item in dataset}
        # The exercises of a task share their wording, so the question as a whole is the content, not its 8-grams.
        rows = [
            question_row(question, answer, content=hashlib.sha256(question.encode()).hexdigest())
            for question, answer in list(unique.items())[:wanted]
        ]
        held_out += rows[:MATHS_HELD_OUT_PER_TASK]
        train += rows[MATHS_HELD_OUT_PER_TASK:]
    rng = random.Random(seed)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def mmlu_worked_answers(prompts: bytes) -> list[Row]:
    """Multiple choice questions with worked answers over all subjects; evaluation only.

    The first few of each subject that are not over-long, in the file's order: no choice is made by hand.
    """
    rows: list[Row] = []
    for text in json.loads(prompts).values():
        kept = 0
        for block in re.split(r"\n\n(?=Q: )", text)[1:]:
            match = re.fullmatch(r"Q: (.*?)\nA: (.*)", block.strip(), re.DOTALL)
            if match and kept < MMLU_PER_SUBJECT and len(block.split()) <= MMLU_MAX_WORDS:
                rows.append(question_row(match[1].strip(), match[2].strip()))
                kept += 1
    return rows
