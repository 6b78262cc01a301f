"""The demo's data sets: splits without leaks, parsing, and the check that finds a planted overlap."""

import json
import random
from pathlib import Path

import pytest

from examples.demo import domain, general, prompts, rehearsal, rows
from examples.demo.domain import Diagnosis
from examples.demo.rows import question_row, text_row

TABULAR = b"""<?xml version="1.0"?>
<ICD10CM.tabular>
  <chapter><name>1</name><desc>Certain infectious diseases (A00-B99)</desc>
    <sectionIndex><sectionRef first="A00" last="A09" id="A00-A09">Intestinal</sectionRef></sectionIndex>
    <section id="A00-A09"><desc>Intestinal infections</desc>
      <diag><name>A00</name><desc>Cholera</desc>
        <diag><name>A00.0</name><desc>Cholera due to Vibrio cholerae</desc>
          <inclusionTerm><note>Classical cholera</note></inclusionTerm></diag>
      </diag>
    </section>
  </chapter>
  <chapter><name>2</name><desc>Neoplasms (C00-D49)</desc>
    <section id="C00-C14"><diag><name>C00</name><desc>Malignant neoplasm of lip</desc></diag></section>
  </chapter>
</ICD10CM.tabular>"""
CHAPTERS = {1: "Infectious diseases", 2: "Neoplasms"}


def made_up_diagnoses(*, categories: int = 12, each: int = 6) -> list[Diagnosis]:
    return [
        Diagnosis(chapter, f"{letter}{category:02}.{item}", f"{letter} disease {category} form {item}")
        for chapter, letter in ((1, "A"), (2, "C"))
        for category in range(categories)
        for item in range(each)
    ]


def test_chapters_are_parsed_with_their_nested_diagnoses() -> None:
    assert domain.parse_tabular(TABULAR) == [
        Diagnosis(1, "A00", "Cholera"),
        Diagnosis(1, "A00.0", "Cholera due to Vibrio cholerae"),
        Diagnosis(1, "A00.0", "Classical cholera", synonym=True),
        Diagnosis(2, "C00", "Malignant neoplasm of lip"),
    ]


def test_the_split_is_balanced_and_shares_no_category() -> None:
    split = domain.split_by_category(
        made_up_diagnoses(), chapters=CHAPTERS, train_per_chapter=20, test_per_chapter=5, seed=1
    )
    assert {row.category for row in split.train}.isdisjoint({row.category for row in split.test})
    for rows_, wanted in ((split.train, 20), (split.test, 5)):
        assert [sum(row.chapter == chapter for row in rows_) for chapter in CHAPTERS] == [wanted, wanted]
    assert [row.chapter for row in split.test[:4]] in ([1, 2, 1, 2], [2, 1, 2, 1])  # prefixes are balanced too
    assert len({row.category for row in split.train}) >= 16  # rows are spread over categories


def test_synonyms_serve_in_training_only() -> None:
    rows_ = made_up_diagnoses()
    rows_ += [Diagnosis(row.chapter, row.code, f"other name of {row.text}", synonym=True) for row in rows_]
    split = domain.split_by_category(rows_, chapters=CHAPTERS, train_per_chapter=80, test_per_chapter=10)
    assert any(row.synonym for row in split.train) and not any(row.synonym for row in split.test)


def test_one_text_in_two_categories_comes_once() -> None:
    twins = [Diagnosis(row.chapter, row.code, row.text.split(" form ")[0]) for row in made_up_diagnoses()]
    twins += [Diagnosis(1, f"A9{i}", "A disease 1") for i in range(9)]
    split = domain.split_by_category(twins, chapters=CHAPTERS, train_per_chapter=8, test_per_chapter=2)
    texts = [row.text for row in split.train + split.test]
    assert len(texts) == len(set(texts))


def test_too_few_diagnoses_are_an_error_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"chapter 1 \(Infectious diseases\): 12 usable test diagnoses, 50 asked for"):
        domain.split_by_category(made_up_diagnoses(), chapters=CHAPTERS, test_per_chapter=50)


def test_nearest_neighbour_finds_look_alikes_and_only_those() -> None:
    train = [Diagnosis(1, "A00", "Cholera due to vibrio"), Diagnosis(2, "C00", "Malignant neoplasm of lip")]
    test = [Diagnosis(1, "A01", "Cholera, unspecified"), Diagnosis(1, "A02", "Malignant neoplasm of hand")]
    assert domain.nearest_neighbour_accuracy(train, test) == 0.5


def test_rows_ask_for_the_label() -> None:
    row = domain.to_row(Diagnosis(2, "C00", "Malignant neoplasm of lip"), CHAPTERS)
    assert row["answer"] == "Neoplasms"
    question = str(row["question"])
    assert "Malignant neoplasm of lip" in question and "(Infectious diseases or Neoplasms)?" in question


SENTENCE = "the quick brown fox jumps over the lazy dog near the old mill"


@pytest.mark.parametrize(
    "held_out",
    [
        text_row(SENTENCE),
        text_row(f"Something else first. Then: QUICK brown fox, jumps over the lazy dog! {'x y z ' * 5}"),
        question_row("Who jumps? " + SENTENCE, "The fox."),
    ],
)
def test_a_planted_overlap_is_found_and_can_be_dropped(held_out: rows.Row) -> None:
    train = {"prose": [text_row("nothing in common with it at all, in no way whatever"), text_row(f"A {SENTENCE}.")]}
    with pytest.raises(ValueError, match="held-out set secret, row 1 shares text with training row prose:2"):
        rows.check_disjoint(train, {"secret": [held_out]})
    kept = rows.drop_overlap(train, {"secret": [held_out]})
    assert kept == {"prose": train["prose"][:1]}
    rows.check_disjoint(kept, {"secret": [held_out]})


def test_short_rows_are_compared_as_a_whole() -> None:
    rows.check_disjoint({"a": [text_row("Chronic pain")]}, {"b": [text_row("Chronic pain of the back")]})
    with pytest.raises(ValueError, match="shares text"):
        rows.check_disjoint({"a": [text_row("Chronic pain")]}, {"b": [text_row("chronic pain.")]})


def test_jsonl_has_one_row_a_line(tmp_path: Path) -> None:
    rows.write_jsonl([text_row("ü\nv"), question_row("q", "a")], tmp_path / "deep" / "x.jsonl")
    lines = (tmp_path / "deep" / "x.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "ü\nv"}, {"question": "q", "answer": "a"}]


def test_worked_answers_are_parsed_per_subject() -> None:
    block = "\n\nQ: How many?\n(A) 1 (B) 2\nA: Let's think step by step. Two. The answer is (B)."
    text = json.dumps({"one": "Intro." + 3 * block, "two": "Intro.\n\nQ: Long?\nA: " + "word " * 400})
    parsed = general.mmlu_worked_answers(text.encode())
    assert len(parsed) == general.MMLU_PER_SUBJECT
    assert parsed[0].data == {
        "question": "How many?\n(A) 1 (B) 2",
        "answer": "Let's think step by step. Two. The answer is (B).",
    }


def test_civics_rows_that_depend_on_the_place_are_left_out() -> None:
    items = [{"question": f"Q{i}?", "answers": ["the law"], "context": "Since 1788."} for i in range(30)]
    items[3]["answers"] = ["Varies by state"]
    train, held_out = general.civics(json.dumps(items).encode(), seed=0)
    assert len(train) + len(held_out) == 29
    assert held_out[0].data["answer"] == "The law. Since 1788."


def test_maths_exercises_do_not_repeat_across_sides() -> None:
    train, held_out = general.maths_and_logic(seed=3)
    questions = [row.data["question"] for row in train + held_out]
    assert len(questions) == len(set(questions))
    assert len(held_out) == general.MATHS_HELD_OUT_PER_TASK * len(general.MATHS_TASKS)
    rows.check_disjoint({"train": train}, {"test": held_out})


def test_prose_is_prose_and_split_by_topic() -> None:
    paragraph = "This is a paragraph of ordinary words that explains topic {} and goes on for long enough to count."
    text = "Title\n*****\n\n" + paragraph + '\n\n   if_stmt ::= "if"\n\nShort one.\n\n* a list\n  of things that ends.'
    train, held_out = general.prose({f"t{i}": text.format(i) for i in range(100)}, seed=0)
    assert len(held_out) == general.PROSE_HELD_OUT and len(train) == 100 - general.PROSE_HELD_OUT
    assert all(row.data["text"].startswith("This is a paragraph") for row in train)
    assert not {row.content for row in train} & {row.content for row in held_out}


def test_prompts_are_many_distinct_and_the_same_each_time() -> None:
    made = prompts.rehearsal_prompts(0)
    assert made == prompts.rehearsal_prompts(0) and made != prompts.rehearsal_prompts(1)
    assert len({prompt.text for prompt in made}) == len(made) >= 800
    asked = {prompt.category for prompt in made[:100]}
    assert asked == {"reasoning-instruction-following", "knowledge", "writing"}
    assert not any("{" in prompt.text for prompt in made)


def test_rehearsal_is_generated_once_per_prompts_and_options(tmp_path: Path) -> None:
    calls = []

    def generate(texts: list[str], options: rehearsal.RehearsalOptions) -> list[str]:
        calls.append(len(texts))
        return [f"An answer of some length to {text}" if "poem" not in text else "No." for text in texts]

    made = prompts.rehearsal_prompts(0)
    random.Random(0).shuffle(made)
    options = rehearsal.RehearsalOptions(prompts=40)
    first = rehearsal.rehearsal_rows(made, options, base="x", cache=tmp_path, generate=generate)
    again = rehearsal.rehearsal_rows(made, options, base="x", cache=tmp_path, generate=generate)
    assert first == again and calls == [40]
    rehearsal.rehearsal_rows(made, options, base="another model", cache=tmp_path, generate=generate)
    assert calls == [40, 40]
    assert all(row.data["answer"] != "No." for rows_ in first.values() for row in rows_)


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("One. Two is cut of", "One."),
        ("All said.", "All said."),
        ("- a\n- b is cu", "- a"),
        ("nothing is finished he", ""),
        ("Is 3.14 a number? It is pi, ro", "Is 3.14 a number?"),
    ],
)
def test_cut_off_answers_end_at_a_sentence(answer: str, kept: str) -> None:
    assert rehearsal.whole_sentences(answer) == kept
