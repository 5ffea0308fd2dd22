"""Token ids of conversations, from those of their pieces: all but the last ones were there a turn before.

A tokenizer cuts a text at its special tokens before it does anything else, and tokenises what lies between piece by
piece. So pieces can be looked up, and a long conversation's next turn costs what is new of it.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from array import array
from collections import OrderedDict
from typing import Any

import tokenizers

MOST_BYTES = 32 << 20
ENTRY_BYTES = 200  # what an ordered dictionary takes for one, measured: 100 to 196
# Pre-tokenizers that see nothing but the piece before them. Metaspace may treat a text's first one otherwise.
PIECEWISE = {
    "BertPreTokenizer",
    "ByteLevel",
    "CharDelimiterSplit",
    "Digits",
    "Punctuation",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
}


class Pieces:
    """Remembers the ids of pieces, those used last, in up to `most` bytes. Any thread may ask.

    Does without where tokens depend on more than their piece: where an added token takes the whitespace beside it or
    counts as a whole word only, or a pre-tokenizer is none of the known.
    """

    def __init__(self, fast: tokenizers.Tokenizer, most: int = MOST_BYTES) -> None:
        self._fast, self._most = fast, most
        self._special = _cuts(fast)
        longest_first = sorted(self._special, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first)).join("()")) if self._special else None
        self._kept: OrderedDict[str, array[int]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without what a tokenizer adds around it."""
        if self._cut is None:
            return self.tokenise(text)
        token_ids: list[int] = []
        for number, piece in enumerate(self._cut.split(text)):
            if number % 2:
                token_ids.append(self._special[piece])
            elif piece:
                token_ids.extend(self._look_up(piece))
        return token_ids

    def _look_up(self, piece: str) -> array[int]:
        with self._lock:
            if (found := self._kept.get(piece)) is not None:
                self._kept.move_to_end(piece)
                return found
        found = array("I", self.tokenise(piece))
        with self._lock:
            if piece not in self._kept:
                self._kept[piece] = found
                self._bytes += size_of(piece, found)
            while self._bytes > self._most:
                self._bytes -= size_of(*self._kept.popitem(last=False))
        return found

    def tokenise(self, text: str) -> list[int]:
        """The same, without a look at what is remembered, and remembering nothing."""
        (encoding,) = self._fast.encode_batch_fast([text], add_special_tokens=False)  # without offsets
        return encoding.ids


def size_of(piece: str, token_ids: array[int]) -> int:
    """Bytes that remembering the ids of `piece` takes."""
    return ENTRY_BYTES + sys.getsizeof(piece) + sys.getsizeof(token_ids)


def _cuts(fast: tokenizers.Tokenizer) -> dict[str, int]:
    """Ids of the tokens at which a text is cut, by their text; none where pieces depend on one another."""
    added = fast.get_added_tokens_decoder()
    if any(token.lstrip or token.rstrip or token.single_word for token in added.values()):
        return {}
    # Not by `to_str`: that lists all ids up to the largest, and ends the process where there is no memory for them.
    splitting: Any = json.loads(fast.pre_tokenizer.__getstate__()) if fast.pre_tokenizer is not None else None
    if not _is_piecewise(splitting):
        return {}
    return {token.content: token_id for token_id, token in added.items() if not token.normalized}


def _is_piecewise(splitting: Any) -> bool:
    match splitting:
        case None:
            return True
        case {"type": "Sequence", "pretokenizers": steps}:
            return all(map(_is_piecewise, steps))
        case {"type": "Metaspace", "prepend_scheme": "always" | "never"}:
            return True
        case _:
            return splitting["type"] in PIECEWISE
