"""Texts as token ids, and back."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer

from examples.tiny_moe.tokens import END, END_TOKEN, encode, prompts_of, save_tokenizer, train_tokenizer

TEXTS = ["To be, or not to be: that is the question.\n", "  Größe: 1234 naïve ☃ bytes\t\x7f", "the the the theatre"]


def test_texts_come_back_whole() -> None:
    tokenizer = train_tokenizer(iter(TEXTS * 20), vocab=320)
    assert tokenizer.get_vocab_size() <= 320
    assert tokenizer.token_to_id(END_TOKEN) == END
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    digits = [tokenizer.decode([token]) for token in tokenizer.encode("x2024").ids]
    assert digits[-4:] == ["2", "0", "2", "4"]


def test_every_document_begins_with_the_end_token() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), vocab=300)
    ids = encode(tokenizer, TEXTS).tolist()
    starts = [place for place, token in enumerate(ids) if token == END]
    assert len(starts) == 3
    pieces = [ids[start + 1 : stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    assert [tokenizer.decode(piece) for piece in pieces] == TEXTS


def test_a_document_cannot_spell_the_end_token() -> None:
    tokenizer = train_tokenizer(iter(TEXTS), vocab=300)
    ids = encode(tokenizer, [f"before {END_TOKEN} after"]).tolist()
    assert ids.count(END) == 1


def test_prompts_come_from_the_domains_in_turn() -> None:
    dice = random.Random(0)
    texts = {name: [f"{name} {dice.random()} " * 40 for _ in range(count)] for name, count in (("b", 90), ("a", 30))}
    prompts = prompts_of(texts)
    assert len(prompts) == 100
    assert [prompt[0] for prompt in prompts[:4]] == ["a", "b", "a", "b"]
    assert sum(prompt[0] == "a" for prompt in prompts) == 30
    assert all(0 < len(prompt) <= 300 and not prompt[-1].isspace() for prompt in prompts)


def test_the_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(iter(TEXTS), vocab=300)
    save_tokenizer(tokenizer, tmp_path)
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [again.encode(text).ids for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
