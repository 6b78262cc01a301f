"""Build every data set of the demo and prove that training and evaluation share nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import forge_core
from forge_core.data import Tokenizer

from . import assets, domain, general
from .prompts import rehearsal_prompts
from .rehearsal import RehearsalOptions, rehearsal_rows
from .rows import Row, check_disjoint, drop_overlap, write_jsonl

DATA_SEED = 0  # of splits and rehearsal; a training seed does not change the data
HELD_OUT_EVERY = 10  # one rehearsal answer in so many is measured, not trained on
MIN_HELD_OUT = 8


@dataclass(frozen=True)
class DataFacts:
    """What the report says about the data.

    Attributes:
        rows: file name without suffix -> rows.
        dropped: training set -> rows dropped because they overlap with a held-out set.
        nearest_neighbour: accuracy of the 1-NN baseline on the domain's test set, 0 to 1.
    """

    rows: Mapping[str, int]
    dropped: Mapping[str, int]
    nearest_neighbour: float


def build(folder: Path, cache: Path, model: Path) -> DataFacts:
    """Write `<set>-train.jsonl` and `<set>-test.jsonl` of all sets into `folder`.

    Args:
        folder: of the JSONL files.
        cache: of the wheels and the rehearsal answers.
        model: directory of the base model, which writes the rehearsal answers.

    Raises:
        ValueError: training and held-out rows overlap after overlapping training rows were dropped.
    """
    diagnoses = domain.parse_tabular(assets.read_asset(assets.ICD, cache))
    split = domain.split_by_category(diagnoses, seed=DATA_SEED)
    train: dict[str, list[Row]] = {"icd": _domain_rows(split.train)}
    held_out: dict[str, list[Row]] = {"icd": _domain_rows(split.test)}
    for name, (train_rows, held_out_rows) in {
        "prose": general.prose(general.python_topics(), seed=DATA_SEED),
        "civics": general.civics(assets.read_asset(assets.CIVICS, cache), seed=DATA_SEED),
        "maths": general.maths_and_logic(seed=DATA_SEED),
    }.items():
        train[name], held_out[name] = train_rows, held_out_rows
    held_out["mmlu"] = general.mmlu_worked_answers(assets.read_asset(assets.MMLU, cache))
    options = RehearsalOptions(seed=DATA_SEED)
    answers = rehearsal_rows(
        rehearsal_prompts(DATA_SEED),
        options,
        base=assets.MODEL.sha256,
        cache=cache,
        generate=lambda prompts, options: generate_answers(model, prompts, options),
    )
    for name, rows in answers.items():
        count = max(MIN_HELD_OUT, len(rows) // HELD_OUT_EVERY)
        held_out[name], train[name] = rows[:count], rows[count:]
    kept = drop_overlap(train, held_out)
    check_disjoint(kept, held_out)
    counts = {}
    for side, sets in (("train", kept), ("test", held_out)):
        for name, rows in sets.items():
            counts[f"{name}-{side}"] = len(rows)
            write_jsonl(rows, folder / f"{name}-{side}.jsonl")
    return DataFacts(
        rows=counts,
        dropped={name: len(rows) - len(kept[name]) for name, rows in train.items()},
        nearest_neighbour=domain.nearest_neighbour_accuracy(split.train, split.test),
    )


def _domain_rows(diagnoses: Sequence[domain.Diagnosis]) -> list[Row]:
    return [Row(domain.to_row(diagnosis), diagnosis.text) for diagnosis in diagnoses]


def generate_answers(model_path: Path, prompts: Sequence[str], options: RehearsalOptions) -> list[str]:
    """Answers of the base model to single-turn prompts, sampled with the product's own generation."""
    model, tokenizer = forge_core.load_model(model_path), Tokenizer.from_pretrained(model_path)
    ids = [
        tokenizer.encode(
            tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)
        )
        for prompt in prompts
    ]
    answers = model.generate(
        ids,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        stop=tokenizer.stop_ids,
    )
    return [tokenizer.decode(answer) for answer in answers]
