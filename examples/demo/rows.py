"""Rows of the demo's data sets, their files, and the check that training and evaluation share nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forge_core.atomic import write_text

NGRAM_WORDS = 8


@dataclass(frozen=True)
class Row:
    """One line of a JSONL file.

    Attributes:
        data: what is written: {"question", "answer"} or {"text"}, plus columns for tracing.
        content: the part that carries the row's information. The frame around it (a question that all rows of a set
            share) is left out, so that it does not count as overlap.
    """

    data: Mapping[str, str | float]
    content: str


def question_row(question: str, answer: str, *, content: str | None = None) -> Row:
    """Question/answer row; its content is both texts unless given."""
    return Row({"question": question, "answer": answer}, content or f"{question}\n{answer}")


def text_row(text: str) -> Row:
    """Plain text row."""
    return Row({"text": text}, text)


def write_jsonl(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON object a line; the file is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(dict(row.data), ensure_ascii=False) + "\n" for row in rows))


def fingerprints(content: str) -> set[bytes]:
    """Hashes of the content's word 8-grams, case and punctuation aside; of the whole content when it is shorter."""
    words = re.findall(r"\w+", content.casefold())
    count = max(1, len(words) - NGRAM_WORDS + 1)
    grams = (" ".join(words[i : i + NGRAM_WORDS]) for i in range(count))
    return {hashlib.blake2b(gram.encode(), digest_size=8).digest() for gram in grams}


def drop_overlap(train: Mapping[str, Sequence[Row]], held_out: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """Training sets without the rows that share a text or a word 8-gram with any held-out row."""
    seen: set[bytes] = set()
    for rows in held_out.values():
        for row in rows:
            seen |= fingerprints(row.content)
    return {name: [row for row in rows if seen.isdisjoint(fingerprints(row.content))] for name, rows in train.items()}


def check_disjoint(train: Mapping[str, Sequence[Row]], held_out: Mapping[str, Sequence[Row]]) -> None:
    """Make sure that no held-out row, and no word 8-gram of one, is in a training set.

    Raises:
        ValueError: names the sets and the row of the first overlap.
    """
    owners: dict[bytes, str] = {}
    for name, rows in train.items():
        for number, row in enumerate(rows, start=1):
            for fingerprint in fingerprints(row.content):
                owners.setdefault(fingerprint, f"{name}:{number}")
    for name, rows in held_out.items():
        for number, row in enumerate(rows, start=1):
            shared = sorted(owners[mark] for mark in fingerprints(row.content) if mark in owners)
            if shared:
                raise ValueError(
                    f"held-out set {name}, row {number} shares text with training row {shared[0]}: "
                    f"{row.content[:80]!r}; results on it would not be held-out results"
                )
