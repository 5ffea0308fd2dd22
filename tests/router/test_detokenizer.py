from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders

from splitserve.cluster.errors import ModelLoadError
from splitserve.router.detokenizer import Detokenizer, TokenTable
from tests.router.tiny_tokenizers import byte_fallback, byte_level

ALPHABET = "the quick fox  \n\tüé你好世界🙂👍🏽\u200d👩🇩🇪\u0301ﷺ𝔘"


def token(tokenizer: Tokenizer, piece: str) -> int:
    token_id = tokenizer.token_to_id(piece)
    assert token_id is not None, piece
    return token_id


def pieces(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(TokenTable(tokenizer))
    return [*map(detokenizer.push, token_ids), detokenizer.finish()]


def random_text(rng: random.Random) -> str:
    return "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 40)))


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_every_prefix_shows_only_whole_characters_and_the_sum_equals_a_full_decode(
    make: Callable[[], Tokenizer],
) -> None:
    tokenizer = make()
    for seed in range(500):
        text = random_text(random.Random(seed))
        shown = ""
        token_ids = tokenizer.encode(text).ids
        for piece in pieces(tokenizer, token_ids):
            shown += piece
            assert text.startswith(shown), seed
        assert shown == text == tokenizer.decode(token_ids), seed


def test_any_token_sequence_decodes_as_the_library_does() -> None:
    tokenizer = byte_level()
    size = tokenizer.get_vocab_size()
    broken = 0
    for seed in range(2000):
        rng = random.Random(seed)
        token_ids = [rng.randrange(size) for _ in range(rng.randrange(1, 12))]
        expected = tokenizer.decode(token_ids)
        broken += "\ufffd" in expected
        assert "".join(pieces(tokenizer, token_ids)) == expected, token_ids
    assert broken > 500  # broken UTF-8 was among them


def test_any_byte_fallback_sequence_decodes_as_the_library_does_unless_its_bytes_are_broken() -> None:
    tokenizer = byte_fallback()
    size = tokenizer.get_vocab_size()
    whole = 0
    for seed in range(3000):
        rng = random.Random(seed)
        token_ids = [rng.randrange(size) if rng.random() < 0.2 else rng.randrange(259, size) for _ in range(8)]
        expected, found = tokenizer.decode(token_ids), "".join(pieces(tokenizer, token_ids))
        if "\ufffd" in expected:
            assert found.replace("\ufffd", "")
        else:
            whole += 1
            assert found == expected, token_ids
    assert whole > 300


def test_a_broken_run_of_byte_tokens_loses_only_what_is_broken() -> None:
    tokenizer = byte_fallback()
    ids = [token(tokenizer, f"<0x{byte:02X}>") for byte in "你".encode() + b"\xff"]
    assert "".join(pieces(tokenizer, ids)) == "你\ufffd"
    assert tokenizer.decode(ids) == "\ufffd" * 4


def test_only_the_first_space_of_the_text_is_stripped() -> None:
    tokenizer = byte_fallback()
    space, letter = token(tokenizer, "▁"), token(tokenizer, "a")
    assert pieces(tokenizer, [space, space, letter, space]) == ["", " ", "a", " ", ""]
    assert pieces(tokenizer, [letter, space]) == ["a", " ", ""]


def test_special_and_unknown_tokens_show_nothing() -> None:
    tokenizer = byte_level()
    special = token(tokenizer, "<|im_end|>")
    assert pieces(tokenizer, [special, 10**6]) == ["", "", ""]
    assert pieces(tokenizer, [token(tokenizer, "<tool é>")]) == ["<tool é>", ""]


def test_a_decoder_that_is_not_bytewise_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ModelLoadError, match=r"WordPiece.*supported are ByteLevel"):
        TokenTable(tokenizer)
