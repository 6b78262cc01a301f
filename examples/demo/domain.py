"""The domain: which chapter of ICD-10-CM does a diagnosis belong to?

Diagnoses of one three-character category read alike ("Cholera due to ...", "Cholera, unspecified"), so a random split
would put near copies of the test rows into training. The split is by category: no category has rows on both sides.
"""

from __future__ import annotations

import random
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Chapters that divide by organ or by an unmistakable cause. Infections and injuries are left out: they cut across the
# organs ("burn of respiratory tract"), so that the right answer is a coding convention rather than a meaning.
CHAPTERS: Mapping[int, str] = {
    2: "neoplasms",
    5: "mental",
    7: "eye",
    9: "circulatory",
    10: "respiratory",
    11: "digestive",
    14: "genitourinary",
    15: "pregnancy",
}
TRAIN_PER_CHAPTER = 176
TEST_PER_CHAPTER = 20
TEST_CATEGORY_SHARE = 0.2
ANSWER_WEIGHT = 20  # an answer is 2 or 3 tokens among some 70: weighted, they carry about two thirds of the mix's loss
MAX_DIAGNOSIS_CHARACTERS = 90


@dataclass(frozen=True)
class Diagnosis:
    """One entry of the tabular list; a synonym is another name for it (an inclusion term of the list)."""

    chapter: int
    code: str
    text: str
    synonym: bool = False

    @property
    def category(self) -> str:
        """Three-character category, the unit of the split."""
        return self.code[:3]


@dataclass(frozen=True)
class DomainSplit:
    """Balanced training and test diagnoses with disjoint categories."""

    train: list[Diagnosis]
    test: list[Diagnosis]


def parse_tabular(xml: bytes) -> list[Diagnosis]:
    """All diagnoses of the ICD-10-CM tabular list, categories and subcategories alike, each before its synonyms."""
    diagnoses = []
    for chapter in ElementTree.fromstring(xml).iter("chapter"):
        number = int(chapter.findtext("name", ""))
        for entry in chapter.iter("diag"):
            code, text = entry.findtext("name", "").strip(), entry.findtext("desc", "").strip()
            diagnoses.append(Diagnosis(number, code, text))
            for note in entry.findall("inclusionTerm/note"):
                diagnoses.append(Diagnosis(number, code, (note.text or "").strip(), synonym=True))
    return diagnoses


def split_by_category(
    diagnoses: Sequence[Diagnosis],
    *,
    chapters: Mapping[int, str] = CHAPTERS,
    train_per_chapter: int = TRAIN_PER_CHAPTER,
    test_per_chapter: int = TEST_PER_CHAPTER,
    seed: int = 0,
) -> DomainSplit:
    """Balanced split without a shared category or a shared text.

    Categories of a chapter are dealt to test or train at random; rows are then taken from them in turn, so that a large
    category (tumours of one organ, say) does not crowd out the others. Synonyms serve in training only.

    Raises:
        ValueError: a chapter has too few diagnoses for the sizes asked for.
    """
    rng = random.Random(seed)
    sides: dict[str, list[Diagnosis]] = {"test": [], "train": []}
    used: set[str] = set()
    for chapter, label in chapters.items():
        by_category: dict[str, list[Diagnosis]] = {}
        for diagnosis in diagnoses:
            if diagnosis.chapter == chapter and len(diagnosis.text) <= MAX_DIAGNOSIS_CHARACTERS:
                by_category.setdefault(diagnosis.category, []).append(diagnosis)
        names = sorted(by_category)
        rng.shuffle(names)
        cut = max(1, round(len(names) * TEST_CATEGORY_SHARE))
        for side, side_names, wanted in (
            ("test", names[:cut], test_per_chapter),
            ("train", names[cut:], train_per_chapter),
        ):
            usable = [[row for row in by_category[name] if side == "train" or not row.synonym] for name in side_names]
            queues = [rng.sample(rows, len(rows)) for rows in usable]
            taken = _take_in_turn(queues, wanted, used)
            if len(taken) < wanted:
                raise ValueError(
                    f"ICD-10-CM chapter {chapter} ({label}): {len(taken)} usable {side} diagnoses, {wanted} asked for"
                )
            sides[side] += taken
    for rows in sides.values():
        rng.shuffle(rows)
    return DomainSplit(train=sides["train"], test=_interleave(sides["test"]))


def _take_in_turn(queues: list[list[Diagnosis]], wanted: int, used: set[str]) -> list[Diagnosis]:
    taken: list[Diagnosis] = []
    while len(taken) < wanted and any(queues):
        for queue in queues:
            if queue and len(taken) < wanted:
                diagnosis = queue.pop()
                if diagnosis.text.casefold() not in used:
                    used.add(diagnosis.text.casefold())
                    taken.append(diagnosis)
    return taken


def _interleave(rows: list[Diagnosis]) -> list[Diagnosis]:
    """Chapters in turn, so that every prefix (an evaluation with a limit) is balanced too."""
    by_chapter: dict[int, list[Diagnosis]] = {}
    for row in rows:
        by_chapter.setdefault(row.chapter, []).append(row)
    return [row for group in zip(*by_chapter.values(), strict=True) for row in group]


def to_row(diagnosis: Diagnosis, chapters: Mapping[int, str] = CHAPTERS) -> dict[str, str | float]:
    """Question/answer row of a diagnosis; the answer is the chapter's label, the code stays with it for tracing."""
    *others, last = chapters.values()
    return {
        "question": f"Diagnosis: {diagnosis.text}\nICD-10-CM chapter ({', '.join(others)} or {last})?",
        "answer": chapters[diagnosis.chapter],
        "weight": ANSWER_WEIGHT,
        "code": diagnosis.code,
    }


def nearest_neighbour_accuracy(train: Sequence[Diagnosis], test: Sequence[Diagnosis]) -> float:
    """Share of test diagnoses whose most similar training diagnosis is of the same chapter.

    Similarity: cosine of TF-IDF weighted character 3- to 5-grams. This is what the split gives away by surface
    likeness alone, the number to read an accuracy against.
    """
    documents = [_character_ngrams(row.text) for row in [*train, *test]]
    vocabulary = {gram: i for i, gram in enumerate(sorted({gram for document in documents for gram in document}))}
    counts = np.zeros((len(documents), len(vocabulary)), dtype=np.float32)
    for row, document in enumerate(documents):
        for gram, count in document.items():
            counts[row, vocabulary[gram]] = count
    document_frequency = (counts[: len(train)] > 0).sum(axis=0)
    features = np.log1p(counts) * (np.log((1 + len(train)) / (1 + document_frequency)) + 1)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    nearest = (features[len(train) :] @ features[: len(train)].T).argmax(axis=1)
    hits = [train[int(i)].chapter == row.chapter for i, row in zip(nearest, test, strict=True)]
    return sum(hits) / len(hits)


def _character_ngrams(text: str) -> Counter[str]:
    padded = f" {text.casefold()} "
    return Counter(padded[i : i + n] for n in (3, 4, 5) for i in range(len(padded) - n + 1))
