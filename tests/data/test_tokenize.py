"""Chat templates and the loss mask: training ids are those of inference, loss is on what the assistant writes."""

import datetime
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from forge_core.data import ChatTemplate, ChatTemplateError, DataError, Message, Tokenizer

from .tiny import CHATML, SENTENCES, tiny_backend, tiny_tokenizer

# A template that puts a BOS once, strips contents and knows no system role.
TURNS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}"
    "<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning is shown in the last turn only: earlier turns change once the chat goes on.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = st.sampled_from(["fox", " ", "\n", "e", "im_end", "two\n\n", "é", "🦊", "What", "assistant\n", "<", "|>"])
CONTENTS = st.lists(WORDS, min_size=1, max_size=5).map("".join).filter(str.strip)


def turns(contents: list[str]) -> list[Message]:
    return [Message("assistant" if i % 2 else "user", content) for i, content in enumerate(contents)]


def trained_texts(tokenizer: Tokenizer, messages: list[Message]) -> list[str]:
    ids, mask = tokenizer.encode_conversation(messages)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    spans: list[list[int]] = []
    for i, wanted in enumerate(mask):
        if wanted:
            if i == 0 or not mask[i - 1]:
                spans.append([])
            spans[-1].append(ids[i])
    return [tokenizer.decode(span) for span in spans]


@settings(max_examples=80, deadline=None)
@given(st.lists(CONTENTS, min_size=2, max_size=6).filter(lambda parts: len(parts) % 2 == 0), st.data())
def test_loss_is_on_answers_and_ids_are_those_of_inference(contents: list[str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["chatml", "turns", "generation"]))
    template = {"chatml": CHATML, "turns": TURNS, "generation": GENERATION}[name]
    tokenizer = tiny_tokenizer(template)
    messages = turns(contents)
    ids, mask = tokenizer.encode_conversation(messages)
    assert tokenizer.decode(ids) == tokenizer.apply_chat_template(messages)
    answers = [text.strip() if name == "turns" else text for text in contents[1::2]]
    assert trained_texts(tokenizer, messages) == [answer + "<|im_end|>" for answer in answers]
    # Exactly the ids that inference gets as its first prompt, then the answer on its own.
    prompt = tokenizer.encode(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True))
    assert ids[: len(prompt)] == prompt and mask[: len(prompt) + 1] == [0] * len(prompt) + [1]
    if not any(answer[0].isspace() for answer in answers):
        for index in range(1, len(messages), 2):
            prompt = tokenizer.encode(tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True))
            assert ids[: len(prompt)] == prompt


def test_an_answer_that_would_melt_into_the_prompt_is_encoded_apart() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.encode("assistant\n\n\nten") != tokenizer.encode("assistant\n") + tokenizer.encode("\n\nten")
    assert trained_texts(tokenizer, turns(["Q", "\n\nten"])) == ["\n\nten<|im_end|>"]


def test_turns_without_loss() -> None:
    messages = [Message("user", "a"), Message("assistant", "b", train=False), *turns(["c", "d"])]
    assert trained_texts(tiny_tokenizer(), messages) == ["d<|im_end|>"]
    assert trained_texts(tiny_tokenizer(GENERATION), messages) == ["d<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, TURNS, GENERATION, FORGETFUL, "{{ messages | tojson }}"])
@pytest.mark.parametrize("prompt", [False, True])
def test_rendering_equals_transformers(template: str, prompt: bool) -> None:
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    peer = PreTrainedTokenizerFast(tokenizer_object=tiny_backend(), chat_template=template, **names)
    messages = [{"role": "user", "content": " <é> & 'a' "}, {"role": "assistant", "content": "b\n"}]
    ours = tiny_tokenizer(template).apply_chat_template(messages, add_generation_prompt=prompt)
    assert ours == peer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def test_generation_blocks_equal_transformers() -> None:
    peer = PreTrainedTokenizerFast(tokenizer_object=tiny_backend(), chat_template=GENERATION)
    messages = [{"role": role, "content": text} for role, text in [("user", "a"), ("assistant", "two fox")] * 3]
    theirs = peer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert tiny_tokenizer(GENERATION).encode_conversation(messages) == (theirs["input_ids"], theirs["assistant_masks"])


def test_a_template_that_rewrites_history_is_refused_beyond_one_turn() -> None:
    tokenizer = tiny_tokenizer(FORGETFUL)
    assert trained_texts(tokenizer, turns(["a", "b"])) == ["<think>\n\n</think>\n\nb<|im_end|>"]
    with pytest.raises(
        ChatTemplateError, match=r"messages\[1\]: the chat template renders .* Give each assistant turn"
    ):
        tokenizer.encode_conversation(turns(["a", "b", "c", "d"]))


def test_templates_run_in_a_sandbox_and_report_their_errors() -> None:
    with pytest.raises(ChatTemplateError, match="refuses these messages: no system role"):
        tiny_tokenizer(TURNS).apply_chat_template([Message("system", "s")])
    with pytest.raises(ChatTemplateError, match=r"refuses these messages: .*unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([])
    with pytest.raises(ChatTemplateError, match="line 2: "):
        ChatTemplate("a\n{% if %}")
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        tiny_tokenizer(None).encode_conversation(turns(["a", "b"]))
    with pytest.raises(ChatTemplateError, match="a filter changes the text"):
        trimmed = "{% filter trim %}{% generation %} a{% endgeneration %}{% endfilter %}"
        tiny_tokenizer(trimmed).encode_conversation(turns(["a", "b"]))


def test_the_date_is_fixed_and_part_of_the_hash() -> None:
    source = "{{ strftime_now('%d %b %Y') }}"
    other = ChatTemplate(source, date=datetime.datetime(2025, 1, 2))
    assert (ChatTemplate(source).render([]), other.render([])) == ("26 Jul 2024", "02 Jan 2025")
    assert ChatTemplate(source).hash == ChatTemplate(source).hash != other.hash


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_word_boundary_tokenizers(scheme: str) -> None:
    """SentencePiece style: a word carries its space, so an answer is only encoded right behind its prompt."""
    words = ["<unk>", "<s>", "</s>", "▁[INST]", "▁hi", "▁[/INST]", "▁yes", "▁sure", "▁[/INST]yes"]
    backend = tokenizers.Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Metaspace(prepend_scheme=scheme)
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %} [INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer(backend, named_tokens=names, template=ChatTemplate(template, names))
    ids, mask = tokenizer.encode_conversation(turns(["hi", "yes", "hi", "sure"]))
    expected = [
        "<s>",
        *["▁[INST]", "▁hi", "▁[/INST]", "▁yes", "</s>"],
        *["▁[INST]", "▁hi", "▁[/INST]", "▁sure", "</s>"],
    ]
    assert [backend.id_to_token(i) for i in ids] == expected
    assert mask == [0, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1]
    glued = Tokenizer(
        backend, named_tokens=names, template=ChatTemplate(template.replace("{% else %} ", "{% else %}"), names)
    )
    with pytest.raises(ChatTemplateError, match=r"melts the end of the prompt .*'yes</s>'"):
        glued.encode_conversation(turns(["hi", "yes"]))


def save(folder: Path, config: dict[str, object], **files: str) -> Path:
    tiny_backend().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def test_from_pretrained(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": None, "pad_token": "<|endoftext|>"}
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
    save(tmp_path, {**config, "chat_template": named}, generation_config__json='{"eos_token_id": [0]}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (0, None, 0)
    assert tokenizer.stop_ids == (0, 2)  # end of text, and the end of turn that the template writes
    assert tokenizer.special_tokens == ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    assert tokenizer.apply_chat_template(turns(["a"])) == tiny_tokenizer().apply_chat_template(turns(["a"]))
    assert tokenizer.encode_documents(["ten", ""]) == [[*tokenizer.encode("ten"), 0], [0]]
    assert tokenizer.decode([*tokenizer.encode("ten"), 0], skip_special_tokens=True) == "ten"
    (tmp_path / "chat_template.jinja").write_text(GENERATION)
    again = Tokenizer.from_pretrained(tmp_path)
    assert again.template is not None and again.template.has_generation_blocks
    assert again.file_hash == tokenizer.file_hash and again.template_hash != tokenizer.template_hash


def test_from_pretrained_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json: no such file; expected a model folder"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)
    save(tmp_path, {}, tokenizer_config__json="{,")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: not valid JSON"):
        Tokenizer.from_pretrained(tmp_path)


def test_every_text_survives() -> None:
    tokenizer = tiny_tokenizer()
    for text in [*SENTENCES, "\u2028 🦊\r\n\t", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode("".join(SENTENCES))) < tokenizer.vocab_size
