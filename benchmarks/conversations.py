"""How long a router tokenises the next turn of a long conversation, template included.

SmolLM2's tokenizer, messages of 1,500 characters of this project's documents; all but the last two were there a turn
before. The peer is the tokenizers library on the whole text.

    python -m benchmarks.conversations
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from tokenizers import Tokenizer as Fast

from benchmarks.rows import Figure, Row, write
from splitserve.models.resolve import SMOLLM2, resolve_model
from splitserve.router.tokenizer import Tokenizer

TURNS, CHARACTERS, REPEATS = (5, 21, 61), 1500, 10
DOCUMENTS = Path(__file__).parents[1] / "docs"


def main() -> None:
    folder = resolve_model(SMOLLM2)
    library = Fast.from_file(str(folder / "tokenizer.json"))
    text = "\n".join(path.read_text("utf-8") for path in sorted(DOCUMENTS.glob("*.md")))
    for turns in TURNS:
        ours, whole = [], []
        for repeat in range(REPEATS):
            tokenizer, messages = Tokenizer.load(folder), conversation(text[repeat:], turns)
            tokenizer.encode_chat(messages[:-2])
            seconds, token_ids = timed(tokenizer.encode_chat, messages)
            ours.append(seconds * 1e3)
            rendered = library.decode(token_ids, skip_special_tokens=False)
            seconds, encodings = timed(library.encode_batch_fast, [rendered])
            whole.append(seconds * 1e3)
            if token_ids != encodings[0].ids:
                raise RuntimeError("the tokens differ from the library's")
        case = f"conversation of {len(token_ids) // 1000}k tokens, next turn"
        write([Row("conversations", case, "tokenised in", "ms", Figure.of(ours), "tokenizers", median(whole), "lower")])


def conversation(text: str, turns: int) -> list[dict[str, str]]:
    """The user and the assistant say what comes next in `text`, from its start again where it ends."""
    contents = [text[turn * CHARACTERS % len(text) :][:CHARACTERS] for turn in range(turns)]
    return [{"role": "assistant" if turn % 2 else "user", "content": each} for turn, each in enumerate(contents)]


def timed(encode: Callable[[list[Any]], Any], texts: list[Any]) -> tuple[float, Any]:
    """Seconds, and what was found."""
    begin = time.perf_counter()
    found = encode(texts)
    return time.perf_counter() - begin, found


if __name__ == "__main__":
    main()
