"""Step 3, transform: the row formats in use become one conversation or one piece of text."""

import math
from dataclasses import dataclass
from typing import Any

from .read import DataError, Record

_ROLE_ALIASES = {"developer": "system"}
_FORMAT_HELP = (
    '"messages", "question" + "answer", "prompt" + "completion", or "text"; '
    'map other names with columns, e.g. columns: {question: "<your column>"}'
)
DOCUMENT_SEPARATOR = "[DOC]"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: role is "system", "user" or "assistant" once validated; `train` False takes no loss from it."""

    role: str
    content: str
    train: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat with its origin; `weight` scales the loss of its tokens."""

    messages: list[Message]
    file: str = ""
    line: int = 0
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class TextRow:
    """Raw text for continued pre-training with its origin; `weight` scales the loss of its tokens."""

    text: str
    file: str = ""
    line: int = 0
    weight: float = 1.0

    def documents(self) -> list[str]:
        """The documents of the row: the text between `[DOC]` separators, blank ones left out."""
        return [part for part in self.text.split(DOCUMENT_SEPARATOR) if part.strip()]


def to_conversation(record: Record) -> Conversation | TextRow:
    """Recognises the row's format by its columns, in this order.

    * `messages`: a list of {"role", "content"}; content is a string, OpenAI parts ({"type": "text", "text": ...}) or
      Converse blocks ({"text": ...}, "schemaVersion": "bedrock-conversation-2024" with `system` as a list of blocks).
      The role "developer" means "system". OpenAI's `weight: 0` beside a content takes no loss from that turn.
    * `question`, `answer`, optional `system`: strings.
    * `prompt`, `completion`: strings, or lists of messages; optional `system`.
    * `text`: raw text, `TextRow`.

    An optional number `weight` scales the loss of the row. Other columns are ignored.

    Raises:
        DataError: none of these columns (those present are named), or a value of another kind; with file:line.
    """
    data = {name: value for name, value in record.data.items() if value is not None}
    weight = _weight(data.get("weight", 1.0), record)
    system = _system(data.get("system"), record)
    if "messages" in data:
        _check_schema_version(data, record)
        messages = system + _messages(data["messages"], "messages", record)
    elif "question" in data and "answer" in data:
        messages = [
            *system,
            Message("user", _string(data["question"], "question", record)),
            Message("assistant", _string(data["answer"], "answer", record)),
        ]
    elif "prompt" in data and "completion" in data:
        messages = [*system, *_side(data, "prompt", "user", record), *_side(data, "completion", "assistant", record)]
    elif "text" in data:
        return TextRow(_string(data["text"], "text", record), record.file, record.line, weight)
    else:
        raise DataError(
            f"{_where(record)}: the row has the columns {', '.join(map(repr, data)) or '(none)'}, "
            f"expected {_FORMAT_HELP}"
        )
    return Conversation(messages, record.file, record.line, weight)


def _where(record: Record) -> str:
    return f"{record.file}:{record.line}"


def _string(value: object, name: str, record: Record) -> str:
    if not isinstance(value, str):
        raise DataError(f"{_where(record)}: {name} is {_kind(value)}, expected a string; write it in quotes")
    return value


def _kind(value: object) -> str:
    return f"{type(value).__name__} {str(value)[:40]!r}"


def _weight(value: object, record: Record) -> float:
    if value == "":  # an empty CSV cell
        return 1.0
    try:
        weight = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight >= 0):
        raise DataError(f"{_where(record)}: weight is {_kind(value)}, expected a number of at least 0")
    return weight


def _system(value: object, record: Record) -> list[Message]:
    if value is None or value == "" or value == []:
        return []
    return [Message("system", _content(value, "system", record))]


def _check_schema_version(data: dict[str, Any], record: Record) -> None:
    version = data.get("schemaVersion", "bedrock-conversation-2024")
    if version != "bedrock-conversation-2024":
        raise DataError(f"{_where(record)}: schemaVersion is {version!r}, expected 'bedrock-conversation-2024'")
    for name in ("tools", "toolConfig"):
        if data.get(name):
            raise DataError(
                f"{_where(record)}: column {name!r}: tool definitions cannot be trained on; remove the column, or "
                "write the tools into the system message as your model expects them"
            )


def _side(data: dict[str, Any], name: str, role: str, record: Record) -> list[Message]:
    if isinstance(data[name], str):
        return [Message(role, data[name])]
    return _messages(data[name], name, record)


def _messages(value: object, name: str, record: Record) -> list[Message]:
    if not isinstance(value, list):
        raise DataError(f"{_where(record)}: {name} is {_kind(value)}, expected a list of messages")
    messages = []
    for index, item in enumerate(value):
        where = f"{name}[{index}]"
        if not isinstance(item, dict):
            raise DataError(f'{_where(record)}: {where} is {_kind(item)}, expected {{"role": ..., "content": ...}}')
        present = {key: part for key, part in item.items() if part is not None and part != []}
        if not isinstance(present.get("role"), str) or "content" not in present:
            raise DataError(f'{_where(record)}: {where} has {sorted(present)}, expected the keys "role" and "content"')
        for extra in ("tool_calls", "tool_call_id", "function_call", "reasoning", "reasoning_content", "candidates"):
            if present.get(extra):
                raise DataError(
                    f"{_where(record)}: {where}.{extra} cannot be trained on: only text turns are; remove it, or write "
                    "it into the content as your model's template does"
                )
        role = present["role"]
        if present.get("weight", 1) not in (0, 1):
            raise DataError(f"{_where(record)}: {where}.weight is {_kind(present['weight'])}, expected 0 or 1")
        content = _content(present["content"], f"{where}.content", record)
        messages.append(Message(_ROLE_ALIASES.get(role, role), content, bool(present.get("weight", 1))))
    return messages


def _content(value: object, name: str, record: Record) -> str:
    """A string, or a list of text parts in OpenAI's or Converse's form, joined without a separator."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{_where(record)}: {name} is {_kind(value)}, expected a string or a list of text parts")
    texts = []
    for index, part in enumerate(value):
        if isinstance(part, str):
            texts.append(part)
            continue
        present = {key: item for key, item in part.items() if item is not None} if isinstance(part, dict) else {}
        kind = present.pop("type", "text")
        others = sorted(set(present) - {"text"})
        if kind != "text" or others or not isinstance(present.get("text"), str):
            got = kind if kind != "text" else ", ".join(others) or _kind(part)
            raise DataError(
                f"{_where(record)}: {name}[{index}] is a block of kind {got!r}, expected text; "
                "images, video, documents, tools and reasoning blocks cannot be trained on by a text model"
            )
        texts.append(present["text"])
    return "".join(texts)
