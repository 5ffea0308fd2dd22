"""Incremental detokenisation: every token's bytes are looked up once and go through one UTF-8 decoder.

That is amortised O(1) a token, holds back what is not yet a whole character, and equals decoding everything at once.
One difference to the tokenizers library: where byte-fallback tokens (`<0xE4>`) spell broken UTF-8, the library turns
the whole run of them into U+FFFD, whole characters included; here, only what is broken.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

import tokenizers

from splitserve.cluster.errors import ModelLoadError

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTable(dict[int, bytes]):
    """The bytes that each token adds to a text; none for special tokens and unknown ids. Filled as tokens occur.

    `strip_left` leading spaces are dropped from the whole text. Raises ModelLoadError for decoders whose tokens do not
    map to bytes one by one.
    """

    def __init__(self, fast: tokenizers.Tokenizer) -> None:
        super().__init__()
        self._fast = fast
        self._special = {token for token, added in fast.get_added_tokens_decoder().items() if added.special}
        self._byte_level = False
        self._byte_fallback = False
        self._replace: dict[str, str] = {}
        self.strip_left = 0
        # Not by `to_str`: that lists all ids up to the largest, and ends the process where there is no memory for them.
        decoder: dict[str, Any] = {"type": "none"}
        if fast.decoder is not None:
            decoder = json.loads(fast.decoder.__getstate__())
        for step in decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]:
            self._add_step(step)

    def _add_step(self, step: dict[str, Any]) -> None:
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Replace", "pattern": {"String": str(pattern)}, "content": str(content)} if len(pattern) == 1:
                self._replace[pattern] = content
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                self.strip_left = start
            case {"type": "Fuse"}:
                pass
            case _:
                raise ModelLoadError(
                    f"tokenizer.json: decoder: found {step}; supported are ByteLevel, and Sequences of Replace (of one "
                    "character), ByteFallback, Fuse and Strip (on the left)"
                )

    def __missing__(self, token_id: int) -> bytes:
        self[token_id] = data = self._bytes(token_id)
        return data

    def _bytes(self, token_id: int) -> bytes:
        token = self._fast.id_to_token(token_id)
        if token is None or token_id in self._special:
            return b""
        if self._byte_level:
            # A token with a character outside the alphabet is an added token, kept as written.
            known = all(character in BYTE_OF for character in token)
            return bytes(BYTE_OF[character] for character in token) if known else token.encode()
        if self._byte_fallback and (match := BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        for pattern, content in self._replace.items():
            token = token.replace(pattern, content)
        return token.encode()


class Detokenizer:
    """One sample's text as it grows."""

    def __init__(self, table: TokenTable) -> None:
        self._table = table
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._to_strip = table.strip_left

    def push(self, token_id: int) -> str:
        """The characters that `token_id` completes."""
        text = self._utf8.decode(self._table[token_id])
        return self._strip(text) if self._to_strip and text else text

    def finish(self) -> str:
        """What an unfinished character leaves behind: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)

    def _strip(self, text: str) -> str:
        stripped = text.removeprefix(" ")
        self._to_strip = self._to_strip - 1 if len(stripped) < len(text) else 0
        return self._strip(stripped) if self._to_strip and stripped else stripped


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()
