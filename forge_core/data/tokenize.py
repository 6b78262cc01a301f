"""Step 5, tokenize: conversations become token ids with an exact loss mask."""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tokenizers

from .chat_template import ChatTemplate, ChatTemplateError
from .read import DataError
from .transform import Message

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
Messages = Sequence[Message | Mapping[str, str]]


@dataclass(frozen=True)
class _Layout:
    """Rendered text, and the cuts in it at which a span of assistant tokens begins or ends (in turn)."""

    text: str
    cuts: list[int]

    def segments(self) -> list[str]:
        edges = [0, *self.cuts, len(self.text)]
        return [self.text[start:end] for start, end in pairwise(edges)]


class Tokenizer:
    """A model's tokenizer.json with its chat template.

    Attributes:
        eos_id, bos_id, pad_id: token ids, None where the tokenizer names none.
        stop_ids: ids that end an answer: end of sequence, those of generation_config.json, the template's end of turn.
        special_tokens: texts of the control tokens, which must not appear in data.
        file_hash: hex SHA-256 of tokenizer.json.
        template_hash: hex SHA-256 of the chat template and what it may read; "" without a template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        named_tokens: Mapping[str, str] | None = None,
        template: ChatTemplate | None = None,
        stop_ids: Sequence[int] = (),
        file_hash: str | None = None,
    ) -> None:
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        self.template = template
        self.named_tokens = dict(named_tokens or {})
        self.eos_id = self._id("eos_token")
        self.bos_id = self._id("bos_token")
        self.pad_id = self._id("pad_token")
        added = backend.get_added_tokens_decoder()
        self.special_tokens = sorted(token.content for token in added.values() if token.special)
        alternatives = "|".join(re.escape(token) for token in sorted(self.special_tokens, key=len, reverse=True))
        # What may follow an answer: control tokens and white space only. "(?!)" never matches: no control tokens.
        self._tail = re.compile(rf"(?P<end_of_turn>{alternatives or '(?!)'})(?:\s|{alternatives or '(?!)'})*\Z")
        self.file_hash = file_hash or hashlib.sha256(backend.to_str().encode()).hexdigest()
        self.template_hash = template.hash if template else ""
        known = [*stop_ids, *([] if self.eos_id is None else [self.eos_id])]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys(known))
        end_of_turn = self._end_of_turn(template) if template else None
        if end_of_turn is not None and end_of_turn not in self.stop_ids:
            self.stop_ids = (*self.stop_ids, end_of_turn)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and generation_config.json of a folder.

        Raises:
            FileNotFoundError: no tokenizer.json in the folder.
            DataError: one of the files cannot be read.
        """
        folder = Path(path)
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; expected a model folder with the tokenizer.json of its model"
            )
        content = file.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except ValueError as error:
            raise DataError(f"{file}: not a readable tokenizer ({error})") from error
        config = _read_json(folder / "tokenizer_config.json")
        named = {**_named_tokens(_read_json(folder / "special_tokens_map.json")), **_named_tokens(config)}
        source = _template_source(folder, config)
        stops = _read_json(folder / "generation_config.json").get("eos_token_id")
        return cls(
            backend,
            named_tokens=named,
            template=ChatTemplate(source, named) if source is not None else None,
            stop_ids=[stops] if isinstance(stops, int) else stops or [],
            file_hash=hashlib.sha256(content).hexdigest(),
        )

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, nothing added; control tokens written in it are recognised."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of whole documents: with what the tokenizer puts around text (a BOS, say), ended by EOS."""
        encoded = self.backend.encode_batch(list(texts), add_special_tokens=True)
        end = [] if self.eos_id is None else [self.eos_id]
        return [item.ids if item.ids[-1:] == end else item.ids + end for item in encoded]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, messages: Messages, add_generation_prompt: bool = False) -> str:
        """Text of a chat; with `add_generation_prompt` it ends where the assistant's answer would begin.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages.
        """
        return self._require_template().render(_plain(messages), add_generation_prompt)

    def encode_conversation(self, messages: Messages) -> tuple[list[int], list[int]]:
        """Token ids of a chat and its loss mask: 1 on what the assistant writes, its end of turn included.

        The ids are those of inference: for every trained turn, the ids before it are `encode` of the prompt that
        `apply_chat_template(..., add_generation_prompt=True)` gives for it. Where prompt and answer would melt into one
        token the answer is encoded on its own, as a model that goes on from its own cache sees it.

        `{% generation %}` blocks of the template decide alone what is trained. Other templates are rendered turn by
        turn.

        Raises:
            ChatTemplateError: a later turn changes how an earlier one is rendered (for example reasoning dropped from
                the history), so that one sequence cannot serve all turns.
        """
        return self.encode_conversations([messages])[0]

    def encode_conversations(self, batch: Sequence[Messages]) -> list[tuple[list[int], list[int]]]:
        """`encode_conversation` of several chats, tokenized together (on all cores)."""
        layouts = [self._layout(messages) for messages in batch]
        texts = [text for layout in layouts for text in (layout.text, *(layout.text[:cut] for cut in layout.cuts))]
        encoded = iter(self.backend.encode_batch_fast(texts, add_special_tokens=False))
        results = []
        for layout in layouts:
            ids = next(encoded).ids
            prefixes = [next(encoded).ids for _ in layout.cuts]
            if all(ids[: len(prefix)] == prefix for prefix in prefixes):
                ends = [len(prefix) for prefix in prefixes]
            else:
                ids, ends = self._encode_apart(layout, ids)
            mask = [0] * len(ids)
            for start, end in zip(ends[::2], ends[1::2], strict=True):
                mask[start:end] = [1] * (end - start)
            results.append((ids, mask))
        return results

    def _encode_apart(self, layout: _Layout, joined: list[int]) -> tuple[list[int], list[int]]:
        pieces = [item.ids for item in self.backend.encode_batch_fast(layout.segments(), add_special_tokens=False)]
        ids: list[int] = []
        ends: list[int] = []
        for piece in pieces:
            ids += piece
            ends.append(len(ids))
        if self.decode(ids) != self.decode(joined):
            raise ChatTemplateError(
                "the tokenizer melts the end of the prompt and the start of the answer into one token and cannot "
                f"encode them apart: {layout.segments()[0][-20:]!r} + {layout.segments()[1][:20]!r}; remove the white "
                "space at the start of the answer"
            )
        return ids, ends[:-1]

    def _layout(self, messages: Messages) -> _Layout:
        template = self._require_template()
        plain = _plain(messages)
        trained = [
            message.train if isinstance(message, Message) else True
            for message, item in zip(messages, plain, strict=True)
            if item["role"] == "assistant"
        ]
        if template.has_generation_blocks:
            text, spans = template.generation_spans(plain)
            if not all(trained) and len(spans) != len(trained):
                raise ChatTemplateError(
                    f"the chat template marks {len(spans)} generated parts in {len(trained)} assistant turns; a turn "
                    "without loss (weight 0) cannot be told"
                )
            spans = [span for index, span in enumerate(spans) if len(spans) != len(trained) or trained[index]]
        else:
            text = template.render(plain)
            assistant = [index for index, item in enumerate(plain) if item["role"] == "assistant"]
            spans = [
                self._turn_span(plain, index, text) for index, wanted in zip(assistant, trained, strict=True) if wanted
            ]
        return _Layout(text, [cut for span in spans for cut in span])

    def _turn_span(self, messages: list[dict[str, str]], index: int, text: str) -> tuple[int, int]:
        """Characters of the rendered chat that the assistant writes in turn `index`, its end of turn included."""
        template = self._require_template()
        prompt = template.render(messages[:index], True)
        through = template.render(messages[: index + 1])
        for shown, longer in ((prompt, through), (through, text)):
            if not longer.startswith(shown):
                place = _common_length(shown, longer)
                raise ChatTemplateError(
                    f"messages[{index}]: the chat template renders the chat up to here differently once it goes on: "
                    f"{shown[place : place + 40]!r} becomes {longer[place : place + 40]!r}; one sequence cannot train "
                    "all turns of such a template. Give each assistant turn its own row, or mark what the assistant "
                    "writes with {% generation %} blocks in chat_template.jinja"
                )
        return len(prompt), len(prompt) + self._answer_length(through[len(prompt) :])

    def _answer_length(self, answer: str) -> int:
        """Characters up to the end of turn: the first of the control tokens that end the rendered answer."""
        tail = self._tail.search(answer)
        return tail.end("end_of_turn") if tail else len(answer)

    def _end_of_turn(self, template: ChatTemplate) -> int | None:
        """The control token that the template writes after an answer; None when it writes none."""
        try:
            text = template.render([{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}])
        except ChatTemplateError:
            return None  # a template for other chats than this one says so when it gets a real one
        tail = self._tail.search(text)
        return self.backend.token_to_id(tail["end_of_turn"]) if tail else None

    def _id(self, name: str) -> int | None:
        text = self.named_tokens.get(name)
        return None if text is None else self.backend.token_to_id(text)

    def _require_template(self) -> ChatTemplate:
        if self.template is None:
            raise ChatTemplateError(
                "the tokenizer has no chat template; put a chat_template.jinja beside tokenizer.json, "
                "or train on text rows"
            )
        return self.template


def _common_length(a: str, b: str) -> int:
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


def _plain(messages: Messages) -> list[dict[str, str]]:
    return [
        {"role": item.role, "content": item.content} if isinstance(item, Message) else dict(item) for item in messages
    ]


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{file}: got a JSON {type(value).__name__}, expected an object")
    return value


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            named[name] = text
    return named


def _template_source(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    value = config.get("chat_template")
    if isinstance(value, list):  # several named templates; "default" is the one for chats
        value = {item["name"]: item["template"] for item in value}.get("default")
    return value
