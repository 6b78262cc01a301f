"""Step 2, sanitize: text that would be read as a turn marker or as a control token is defused."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from .transform import Conversation

ROLE_WORDS = ("System", "User", "Assistant", "Bot", "Thought")
RESERVED_TOKENS = ("[EOS]", "<image>", "<video>", "<unk>")

_ROLE_COLON = re.compile(rf"\b({'|'.join(ROLE_WORDS)}):", re.IGNORECASE)


def sanitize_text(text: str, special_tokens: Iterable[str] = ()) -> str:
    """Text of a message without anything that collides with a chat template.

    `System:`, `User:`, `Assistant:`, `Bot:` and `Thought:`, in any case, get a space before the colon. `[EOS]`,
    `<image>`, `<video>`, `<unk>` and the tokenizer's `special_tokens` are removed, also those that only appear once
    others are removed. A second call changes nothing.
    """
    return _ROLE_COLON.sub(r"\1 :", remove_tokens(text, (*RESERVED_TOKENS, *special_tokens)))


def remove_tokens(text: str, tokens: Iterable[str]) -> str:
    """Text without any of `tokens`, longest first, until none is left."""
    present = sorted((token for token in tokens if token), key=len, reverse=True)
    while True:
        cleaned = text
        for token in present:
            cleaned = cleaned.replace(token, "")
        if cleaned == text:
            return cleaned
        text = cleaned


def sanitize_conversation(conversation: Conversation, special_tokens: Sequence[str] = ()) -> Conversation:
    """The conversation with every content passed through `sanitize_text`."""
    messages = [replace(m, content=sanitize_text(m.content, special_tokens)) for m in conversation.messages]
    return replace(conversation, messages=messages)


def collisions(text: str, special_tokens: Iterable[str] = ()) -> list[str]:
    """What `sanitize_text` would change in `text`: role words with their colon and tokens, in order of the rules."""
    found = [match.group(0) for match in _ROLE_COLON.finditer(text)]
    found += [token for token in (*RESERVED_TOKENS, *special_tokens) if token and token in text]
    return list(dict.fromkeys(found))
