"""A conversation's tokens are those of its whole text, whatever of it is remembered."""

from __future__ import annotations

import random
import threading
import tracemalloc
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from splitserve.models.resolve import SMOLLM2, resolve_model
from splitserve.router.pieces import ENTRY_BYTES, MOST_BYTES, Pieces, size_of
from tests.router.tiny_tokenizers import byte_fallback, byte_level


def smollm2() -> Tokenizer:
    return Tokenizer.from_file(str(resolve_model(SMOLLM2) / "tokenizer.json"))


def prefix_space() -> Tokenizer:
    """Each piece begins with a space here, and one special token is another's beginning."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.add_special_tokens(["<|im", "<|im_end|>more"])
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = byte_fallback()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    return tokenizer


def whole_words() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("END", single_word=True)])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "smollm2": smollm2,
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "prefix space": prefix_space,
    "metaspace": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "stripping": stripping,
    "whole words": whole_words,
}
FRAGMENTS = [
    *("<|im_start|>", "<|im_end|>", "<|im", "<|im_end|>more", "<|end|>", "</s>", "<s>", "<tool é>", "END", "<unk>"),
    *(
        "the quick",
        " brown",
        "Fox\n",
        "\n\n",
        "  ",
        " ",
        "\t",
        "12345",
        "é",
        "e\u0301",
        "你好",
        "🙂",
        "👍🏽",
        "<",
        "|>",
        ".",
    ),
    *("\u200d", "\u0301", "don't", "<|im_st", "art|>", "user\n", "assistant\n", "\u3000", "x" * 40),
]


def kept_bytes(pieces: Pieces) -> int:
    return sum(size_of(piece, token_ids) for piece, token_ids in pieces._kept.items())


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("most", [0, 1000, 1 << 20])
def test_tokens_are_those_of_the_whole_text(name: str, most: int) -> None:
    fast, dice = TOKENIZERS[name](), random.Random(f"{name}{most}")
    pieces = Pieces(fast, most)
    for _ in range(400):
        text = "".join(dice.choices(FRAGMENTS, k=dice.randint(0, 12)))
        assert pieces.encode(text) == fast.encode(text, add_special_tokens=False).ids, text
        assert pieces._bytes == kept_bytes(pieces) <= most


@pytest.mark.parametrize("name", ["metaspace first", "stripping", "whole words"])
def test_tokens_that_depend_on_more_than_their_piece_are_not_remembered(name: str) -> None:
    pieces = Pieces(TOKENIZERS[name]())
    pieces.encode("Hello <s> world")
    assert not pieces._kept


def test_only_what_is_new_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces, seen = Pieces(byte_level()), list[str]()
    tokenise = pieces.tokenise

    def note(text: str) -> list[int]:
        seen.append(text)
        return tokenise(text)

    monkeypatch.setattr(pieces, "tokenise", note)
    pieces.encode("<|im_start|>Hello<|im_end|>\n<|im_start|>")
    assert seen == ["Hello", "\n"]
    pieces.encode("<|im_start|>Hello<|im_end|>\n<|im_start|>Hi there")
    assert seen == ["Hello", "\n", "Hi there"]


def test_what_was_used_last_stays() -> None:
    pieces = Pieces(byte_level(), most=2 * (ENTRY_BYTES + 200))
    for text in ("aaaa", "bbbb", "aaaa", "cccc"):
        pieces.encode(text)
    assert list(pieces._kept) == ["aaaa", "cccc"]


@pytest.mark.parametrize("piece", ["a", "🙂", "a" * 500, "🙂" * 500])
def test_memory_is_bounded_whatever_the_pieces(piece: str) -> None:
    most = MOST_BYTES // 32
    pieces = Pieces(byte_level(), most)
    tracemalloc.start()
    for number in range(3 * most // (ENTRY_BYTES + len(piece))):
        pieces.encode(f"{number:x}{piece}")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most / 2 < held < peak < 1.1 * most


def test_threads_may_ask_at_once() -> None:
    fast = byte_level()
    pieces, wrong = Pieces(fast, most=1000), list[str]()

    def ask(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(300):
            text = "<|im_end|>".join(dice.choices(FRAGMENTS, k=6))
            if pieces.encode(text) != fast.encode(text, add_special_tokens=False).ids:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pieces._bytes == kept_bytes(pieces) <= 1000
