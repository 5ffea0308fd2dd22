from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import processors

from splitserve.cluster.errors import InvalidRequest, ModelLoadError
from splitserve.router.chat_template import ChatTemplate
from splitserve.router.tokenizer import Tokenizer
from tests.router.tiny_tokenizers import byte_fallback, byte_level, write_folder

CONVERSATION = [
    {"role": "user", "content": "Hello <|im_end|> & <b>你好</b>"},
    {"role": "assistant", "content": "Hi\n"},
    {"role": "user", "content": "bye "},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_equals_transformers_for_texts_and_conversations(folder: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(folder)
    for text in ("Hello", "a <|im_start|> b", " the fox 🙂\n"):
        assert tokenizer.encode(text) == oracle(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == oracle.decode(oracle(text)["input_ids"], True)
    for length in (1, 3):
        expected = oracle.apply_chat_template(CONVERSATION[:length], add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_chat(CONVERSATION[:length]) == expected


@pytest.mark.parametrize("family", ["byte level", "trimmed", "byte fallback", "bos"])
def test_offsets_say_where_tokens_begin(family: str, tmp_path: Path) -> None:
    fast = byte_fallback() if family == "byte fallback" else byte_level()
    if family == "trimmed":
        fast.post_processor = processors.ByteLevel(trim_offsets=True)
    if family == "bos":
        fast.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $0 <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
        )
    tokenizer = Tokenizer.load(write_folder(tmp_path, fast))
    special = "</s>" if family == "byte fallback" else "<|im_end|>"
    for text in ("the fox", f"{special}the  quick{special} 🙂 é{special}", " the "):
        token_ids = tokenizer.encode(text)
        begins = tokenizer.offsets(text)
        assert begins == sorted(begins)
        names = [tokenizer.token_bytes(token).decode("utf-8", "replace") for token in token_ids]
        blank = " " if family == "byte fallback" else ""  # it puts one before each part
        shown = [
            text[begin:].startswith((name, name.removeprefix(blank)))
            for begin, name in zip(begins, names, strict=True)
            if "\ufffd" not in name
        ]
        assert shown.count(False) == (2 if family == "bos" else 0), "but for what is no part of the text"
        of_ids = tokenizer.offsets(token_ids)
        assert len(of_ids) == len(token_ids)
        for count, begin in enumerate(of_ids):
            assert begin == len(tokenizer.decode(token_ids[:count]).rstrip("\ufffd"))


def test_prompts_are_never_cut_short(tmp_path: Path) -> None:
    """Some models' files hold the settings of their training: prompts of some length, cut or filled up."""
    fast = byte_level()
    fast.enable_truncation(3)
    fast.enable_padding(length=40)
    cut = Tokenizer.load(write_folder(tmp_path, fast))
    assert cut.decode(cut.encode("The quick brown fox")) == "The quick brown fox"
    assert len(cut.encode_chat(CONVERSATION)) > 40


def test_a_template_that_writes_bos_gives_one_bos() -> None:
    template = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", {"bos_token": "<s>"})
    assert template.render(CONVERSATION[2:]) == "<s>bye "


def test_template_helpers_are_those_of_hugging_face() -> None:
    source = (
        "{%- for m in messages %}\n    {% if m.role == 'skip' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}{% generation %}[{{ m.content }}]{% endgeneration %}\n{%- endfor %}"
        "{{ strftime_now('%Y') | length }}"
    )
    rendered = ChatTemplate(source, {}).render([{"role": "skip", "content": "x"}, {"role": "user", "content": "<é>"}])
    assert '{"role": "user", "content": "<é>"}[<é>]' in rendered
    assert rendered.endswith("4")
    assert "skip" not in rendered


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__|unsafe|undefined"),
        ("{{ messages[0].content + 1 }}", "concatenate|str"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}", "rendered characters"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_the_requests_error(source: str, found: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"messages: found .*({found})"):
        ChatTemplate(source, {}).render(CONVERSATION)


def test_chat_template_file_goes_before_the_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "only this"}])) == "only this"


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(InvalidRequest, match="without a chat template"):
        Tokenizer.load(folder).encode_chat(CONVERSATION)


def test_ids_outside_the_vocabulary_are_named(tokenizer: Tokenizer) -> None:
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidRequest, match=f"token_ids: found {wrong}; give token ids from 0 to"):
            tokenizer.decode([1, wrong])


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("tokenizer.json", None, "not found"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("tokenizer_config.json", "{", "not JSON"),
        ("config.json", "[]", "expected an object"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% if %}"}), "not a jinja2 template"),
        ("tokenizer_config.json", json.dumps({"chat_template": 3}), "expected a string"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: str | None, complaint: str) -> None:
    folder = write_folder(tmp_path)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ModelLoadError, match=complaint):
        Tokenizer.load(folder)
