"""Chat templates: a model's jinja2 template in a sandbox, and the spans of its output that the assistant wrote."""

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .read import DataError

# Noncharacters of Unicode mark the ends of {% generation %} blocks in a second rendering.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class ChatTemplateError(DataError):
    """The chat template refuses a conversation, or does not let assistant tokens be told apart exactly."""


class _GenerationBlocks(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the template declares to be written by the assistant."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a set

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marked = nodes.CallBlock(self.call_method("_wrap", [nodes.Name("_mark_generation", "load")]), [], [], body)
        return marked.set_lineno(line)

    def _wrap(self, mark: object, caller: Any) -> str:
        text = caller()
        return f"{_OPEN}{text}{_CLOSE}" if mark is True else text


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja2 text of `chat_template.jinja` or of `tokenizer_config.json`.
        special_tokens: names the template may use, such as {"bos_token": "<s>"}.
        date: what `strftime_now` tells. It is fixed, so that the same data always gives the same tokens.

    Attributes:
        hash: hex SHA-256 of everything that decides the rendered text.
        has_generation_blocks: the template says itself which parts the assistant writes.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str] | None = None,
        date: datetime.datetime = datetime.datetime(2024, 7, 26),
    ) -> None:
        self.special_tokens = dict(special_tokens or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = date.strftime
        try:
            self._template = environment.from_string(source)
            self.has_generation_blocks = any(
                isinstance(node.call, nodes.Call) and _is_generation(node.call)
                for node in environment.parse(source).find_all(nodes.CallBlock)
            )
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        key = json.dumps([source, sorted(self.special_tokens.items()), date.isoformat()])
        self.hash = hashlib.sha256(key.encode()).hexdigest()

    def render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = False) -> str:
        """Text of a chat; with `add_generation_prompt` it ends where the assistant's answer would begin.

        Raises:
            ChatTemplateError: the template raises on these messages.
        """
        return self._render(messages, add_generation_prompt, False)

    def generation_spans(self, messages: Sequence[Mapping[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """Rendered text and the [start, end) character spans of its `{% generation %}` blocks."""
        marked = self._render(messages, False, True)
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        length, start = 0, -1
        for character_run in _split_keeping(marked):
            if character_run == _OPEN:
                start = length
            elif character_run == _CLOSE:
                spans.append((start, length))
            else:
                parts.append(character_run)
                length += len(character_run)
        text = "".join(parts)
        if text != self.render(messages):
            raise ChatTemplateError(
                "chat template: a filter changes the text around a {% generation %} block, so its place is unknown; "
                "move the block outside of the filter"
            )
        return text, spans

    def _render(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool, mark: bool) -> str:
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                _mark_generation=mark,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from error


def _is_generation(call: nodes.Call) -> bool:
    target = call.node
    return isinstance(target, nodes.ExtensionAttribute) and target.identifier == _GenerationBlocks.identifier


def _split_keeping(text: str) -> list[str]:
    parts: list[str] = []
    for part in text.split(_OPEN):
        inner = part.split(_CLOSE)
        for index, piece in enumerate(inner):
            parts.append(piece)
            if index < len(inner) - 1:
                parts.append(_CLOSE)
        parts.append(_OPEN)
    return parts[:-1]


def _to_json(value: object, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which no chat template wants.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
