"""Data: read -> sanitize -> transform -> validate -> tokenize -> mix -> pack -> load, one file a step."""

from .build import build_token_store, load_rows
from .chat_template import ChatTemplate, ChatTemplateError
from .load import BatchStream, iterate_packs
from .pack import AnswerRows, PackedBatch, answer_rows
from .read import DataError, Record, read_records
from .sanitize import sanitize_conversation, sanitize_text
from .store import TokenStore
from .tokenize import Tokenizer
from .transform import Conversation, Message, TextRow, to_conversation
from .validate import Problem, raise_problems, validate_conversations

__all__ = [
    "AnswerRows",
    "BatchStream",
    "ChatTemplate",
    "ChatTemplateError",
    "Conversation",
    "DataError",
    "Message",
    "PackedBatch",
    "Problem",
    "Record",
    "TextRow",
    "TokenStore",
    "Tokenizer",
    "answer_rows",
    "build_token_store",
    "iterate_packs",
    "load_rows",
    "raise_problems",
    "read_records",
    "sanitize_conversation",
    "sanitize_text",
    "to_conversation",
    "validate_conversations",
]
