"""Step 4, validate: every conversation is checked before any compute is spent, and all problems are listed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .read import DataError
from .sanitize import collisions
from .transform import Conversation, TextRow

ROLES = ("system", "user", "assistant")
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with one row."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def validate_conversations(rows: Iterable[Conversation | TextRow], special_tokens: Sequence[str] = ()) -> list[Problem]:
    """Checks rows that are ready to be tokenized; returns all problems, in the rows' order.

    A conversation: an optional system message first, then user and assistant in turn, a user first and an assistant
    last, no empty content, no text that collides with the chat template (see `sanitize_text`). A text row: not blank,
    none of the tokenizer's special tokens.
    """
    return [problem for row in rows for problem in validate_row(row, special_tokens)]


def validate_row(row: Conversation | TextRow, special_tokens: Sequence[str] = ()) -> list[Problem]:
    """The problems of one row; see `validate_conversations`."""
    if isinstance(row, TextRow):
        messages = _text_problems(row, special_tokens)
    else:
        messages = [*_order_problems(row), *_content_problems(row, special_tokens)]
    return [Problem(row.file, row.line, message) for message in messages]


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises a DataError that lists the first problems and counts the rest; does nothing without problems."""
    if problems:
        lines = [str(problem) for problem in problems[:_SHOWN]]
        if len(problems) > _SHOWN:
            lines.append(f"... and {len(problems) - _SHOWN} more")
        raise DataError("\n".join(lines))


def _text_problems(row: TextRow, special_tokens: Sequence[str]) -> list[str]:
    if not row.documents():
        return ["text is empty, expected some text; remove the row"]
    found = [token for token in special_tokens if token in row.text]
    if found:
        return [f"text holds the special token {found[0]!r} of the tokenizer; set sanitize: true to remove it"]
    return []


def _order_problems(row: Conversation) -> list[str]:
    roles = [message.role for message in row.messages]
    unknown = [(index, role) for index, role in enumerate(roles) if role not in ROLES]
    if unknown:
        return [f"messages[{i}]: unknown role {role!r}, expected one of {', '.join(ROLES)}" for i, role in unknown]
    if "user" not in roles or "assistant" not in roles:
        return [f"the roles are {roles}, expected at least one user and one assistant message"]
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start):
        expected = ROLES[1 + (index - start) % 2]
        if role != expected:
            if role == "system":
                return [f"messages[{index}]: a system message must be the first and only one; merge them at the start"]
            return [
                f"messages[{index}]: role {role!r} where {expected!r} was expected; user and assistant must take "
                "turns, starting with the user; merge neighbours of the same role"
            ]
    if roles[-1] != "assistant":
        return [f"messages[{len(roles) - 1}]: the last role is 'user', expected 'assistant': nothing would be learned"]
    if not any(message.train for message in row.messages if message.role == "assistant"):
        return ["every assistant message has weight 0: nothing would be learned; remove the row"]
    return []


def _content_problems(row: Conversation, special_tokens: Sequence[str]) -> list[str]:
    problems = []
    for index, message in enumerate(row.messages):
        if not message.content.strip():
            problems.append(f"messages[{index}]: the {message.role} content is empty; remove the row or fill it")
        found = collisions(message.content, special_tokens)
        if found:
            problems.append(
                f"messages[{index}]: the {message.role} content holds {', '.join(map(repr, found))}, which collides "
                "with the chat template; set sanitize: true to defuse it"
            )
    return problems
