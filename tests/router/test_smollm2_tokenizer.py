"""SmolLM2's own tokenizer and chat template, against transformers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from splitserve.models.resolve import SMOLLM2, resolve_model
from splitserve.router.tokenizer import Tokenizer

CONVERSATION = [
    {"role": "user", "content": "What is the capital of France? <|im_end|> 🙂"},
    {"role": "assistant", "content": "Paris\n"},
    {"role": "user", "content": " 你好, in 1234 words  "},
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(SMOLLM2)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.mark.parametrize("length", [1, 3])
def test_conversations_become_the_same_tokens(tokenizer: Tokenizer, oracle: Any, length: int) -> None:
    messages = CONVERSATION[:length]
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(messages) == expected
    assert len(expected) > 20


def test_texts_become_the_same_tokens_and_back(tokenizer: Tokenizer, oracle: Any) -> None:
    for seed in range(100):
        rng = random.Random(seed)
        text = "".join(rng.choice("ab cD12\n\t.,é你🙂") for _ in range(rng.randrange(1, 60)))
        assert tokenizer.encode(text) == oracle(text)["input_ids"]
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_tokens_become_the_same_text(tokenizer: Tokenizer, oracle: Any) -> None:
    for seed in range(500):
        rng = random.Random(seed)
        token_ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 30))]
        expected = oracle.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(token_ids) == expected
