"""A process that turns constraints into grammars, and proves on the way that each can be compiled in bounded work.

Lines of JSON in and out, `{"kind", "text"}` to `{"grammar"}` or `{"error"}`; the first line out says that it is ready.
What takes more than CHECK_S seconds of CPU or MEMORY_BYTES ends the process, whatever the code is that takes it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from splitserve.cluster.errors import SplitserveError
from splitserve.models.grammar import GrammarCompiler, allowed_tokens
from splitserve.router.parsers.pieces import WHITESPACE

CHECK_S = 2.0
MEMORY_BYTES = 2 * 2**30


def to_grammar(kind: str, text: str) -> str:
    """A constraint in llguidance's form. Raises ValueError for what can be no grammar."""
    from llguidance import LLMatcher, grammar_from

    match kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(text)
        case "choice":
            return LLMatcher.grammar_from_regex("|".join(map(_literal, json.loads(text))))
        case _:
            return grammar_from("grammar", text)


def answer(compiler: GrammarCompiler, request: dict[str, str]) -> dict[str, str]:
    """What to say to one request."""
    try:
        grammar = to_grammar(**request)
        allowed_tokens(compiler.compile(grammar))
    except (SplitserveError, ValueError, RecursionError) as error:
        return {"error": str(getattr(error, "found", error))[:300]}
    return {"grammar": grammar}


def main(folder: str, vocab_size: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        compiler = GrammarCompiler(Path(folder), int(vocab_size), ())
    except SplitserveError as error:
        _say({"error": str(error)})
        return
    _say({})
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, CHECK_S)  # unhandled SIGPROF ends the process
        reply = answer(compiler, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        _say(reply)


def _literal(text: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _say(reply: dict[str, Any]) -> None:
    print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
