"""Sanitizing, transforming and validating rows."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_core.data import (
    Conversation,
    DataError,
    Message,
    Record,
    TextRow,
    raise_problems,
    sanitize_conversation,
    sanitize_text,
    to_conversation,
    validate_conversations,
)

from .tiny import SPECIAL


def chat(*turns: str) -> Conversation:
    """chat("user", "hi", "assistant", "ho")"""
    return Conversation([Message(*pair) for pair in zip(turns[::2], turns[1::2], strict=True)], "data.jsonl", 4)


def transform(**data: Any) -> Conversation | TextRow:
    return to_conversation(Record(data, "data.jsonl", 4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("System: be kind", "System : be kind"),
        ("USER:x user:y User : z", "USER :x user :y User : z"),
        ("aSSistant: Bot:\nThought:", "aSSistant : Bot :\nThought :"),
        ("Ecosystem: superuser: userly", "Ecosystem: superuser: userly"),
        ("a[EOS]b<image>c<video>d<unk>e", "abcde"),
        ("x<|im_end|>y", "xy"),
        ("<im<unk>age>", ""),
        ("Sys<unk>tem: hi", "System : hi"),
        ("[eos] <Image>", "[eos] <Image>"),
    ],
)
def test_sanitizing(text: str, expected: str) -> None:
    assert sanitize_text(text, SPECIAL) == expected


@given(st.lists(st.sampled_from(["System", "bot", ":", " ", "<", "unk", ">", "<|im_", "end|>", "[EOS]", "x"])))
def test_sanitizing_leaves_nothing_and_is_stable(parts: list[str]) -> None:
    clean = sanitize_text("".join(parts), SPECIAL)
    assert sanitize_text(clean, SPECIAL) == clean
    assert not validate_conversations([chat("user", "q" + clean, "assistant", "a")], SPECIAL)
    assert not any(token in clean for token in ("<unk>", "[EOS]", "<|im_end|>"))


def test_sanitizing_a_conversation_keeps_everything_else() -> None:
    before = Conversation([Message("user", "User: a"), Message("assistant", "b<unk>", train=False)], "f", 2, 0.5)
    after = Conversation([Message("user", "User : a"), Message("assistant", "b", train=False)], "f", 2, 0.5)
    assert sanitize_conversation(before) == after


QA = [Message("user", "Q"), Message("assistant", "A")]
SYSTEM = Message("system", "S")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"question": "Q", "answer": "A"}, QA),
        ({"question": "Q", "answer": "A", "system": "S", "id": 3}, [SYSTEM, *QA]),
        ({"question": "Q", "answer": "A", "system": None}, QA),
        ({"prompt": "Q", "completion": "A", "system": ""}, QA),
        ({"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]}, QA),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}, QA),
        (
            {
                "messages": [
                    {"role": "developer", "content": "S"},
                    {"role": "user", "content": [{"type": "text", "text": "Q"}], "name": None},
                    {"role": "assistant", "content": "A", "tool_calls": None},
                ],
                "tools": None,
            },
            [SYSTEM, *QA],
        ),
        (
            {
                "schemaVersion": "bedrock-conversation-2024",
                "system": [{"text": "S"}],
                "messages": [
                    {"role": "user", "content": [{"text": "Q"}]},
                    {"role": "assistant", "content": [{"text": "A", "image": None}]},
                ],
            },
            [SYSTEM, *QA],
        ),
        (
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]},
            [QA[0], Message("assistant", "A", train=False)],
        ),
    ],
)
def test_formats_become_conversations(data: dict[str, Any], expected: list[Message]) -> None:
    assert transform(**data) == Conversation(expected, "data.jsonl", 4)


def test_text_and_its_documents() -> None:
    row = transform(text="one [DOC] two[DOC] [DOC]", weight="0.5")
    assert row == TextRow("one [DOC] two[DOC] [DOC]", "data.jsonl", 4, 0.5)
    assert isinstance(row, TextRow) and row.documents() == ["one ", " two"]


IMAGE = {"image": {"format": "png", "source": {}}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"input": "x", "output": "y"}, r"the row has the columns 'input', 'output', expected \"messages\""),
        ({"question": "x"}, r"the row has the columns 'question'"),
        ({"question": "x", "answer": 4}, r"answer is int '4', expected a string"),
        ({"text": ["x"]}, r"text is list"),
        ({"text": "x", "weight": -1}, r"weight is int '-1', expected a number of at least 0"),
        ({"text": "x", "weight": "much"}, r"weight is str 'much'"),
        ({"messages": "hi"}, r"messages is str 'hi', expected a list"),
        ({"messages": ["hi"]}, r"messages\[0\] is str 'hi'"),
        ({"messages": [{"from": "human", "value": "x"}]}, r"messages\[0\] has \['from', 'value'\], expected the keys"),
        (
            {"messages": [{"role": "user", "content": [IMAGE]}]},
            r"content\[0\] is a block of kind 'image', expected text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            r"block of kind 'image_url'",
        ),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}, r"tool_calls cannot be trained on"),
        (
            {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]},
            r"\.weight is float '0.5', expected 0 or 1",
        ),
        ({"messages": [], "schemaVersion": "v2"}, r"schemaVersion is 'v2'"),
        ({"messages": [], "toolConfig": {"tools": []}}, r"column 'toolConfig'"),
    ],
)
def test_rows_of_another_kind(data: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"^data\.jsonl:4: .*" + message):
        transform(**data)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("user", "a", "bot", "b"), r"messages\[1\]: unknown role 'bot', expected one of system, user, assistant"),
        (
            chat("user", "a", "user", "b", "assistant", "c"),
            r"messages\[1\]: role 'user' where 'assistant' was expected",
        ),
        (chat("assistant", "a", "user", "b"), r"messages\[0\]: role 'assistant' where 'user' was expected"),
        (chat("user", "a", "system", "s", "assistant", "b"), r"messages\[1\]: a system message must be the first"),
        (
            chat("user", "a", "assistant", "b", "user", "c"),
            r"messages\[2\]: the last role is 'user', expected 'assistant'",
        ),
        (chat("user", "a"), r"the roles are \['user'\], expected at least one user and one assistant"),
        (chat(), r"the roles are \[\]"),
        (chat("user", " \n", "assistant", "b"), r"messages\[0\]: the user content is empty"),
        (chat("user", "a", "assistant", ""), r"messages\[1\]: the assistant content is empty"),
        (
            chat("user", "sYstem: a", "assistant", "b"),
            r"messages\[0\]: .*'sYstem:', which collides with the chat template",
        ),
        (chat("user", "a", "assistant", "b<|im_end|>"), r"messages\[1\]: .*'<\|im_end\|>', which collides"),
        (TextRow("[DOC] ", "data.jsonl", 4), r"text is empty"),
        (TextRow("a<|im_end|>", "data.jsonl", 4), r"text holds the special token '<\|im_end\|>'"),
        (
            Conversation([Message("user", "a"), Message("assistant", "b", train=False)], "data.jsonl", 4),
            r"every assistant message has weight 0",
        ),
    ],
)
def test_problems_of_a_row(row: Conversation | TextRow, message: str) -> None:
    (problem,) = validate_conversations([row], SPECIAL)
    assert (problem.file, problem.line) == ("data.jsonl", 4)
    with pytest.raises(DataError, match=r"^data\.jsonl:4: " + message):
        raise_problems([problem])


def test_good_rows_have_no_problems() -> None:
    good = [chat("system", "s", "user", "a", "assistant", "b"), chat(*["user", "a", "assistant", "b"] * 3)]
    assert not validate_conversations([*good, TextRow("User: is fine in raw text")], SPECIAL)


def test_many_problems_are_counted() -> None:
    problems = validate_conversations([chat("user", "a")] * 14)
    with pytest.raises(DataError, match=r"\.\.\. and 4 more$") as caught:
        raise_problems(problems)
    assert str(caught.value).count("data.jsonl:4") == 10
    raise_problems([])
