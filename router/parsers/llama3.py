"""Calls as Llama 3 writes them: the whole answer is `{"name": ..., "parameters": {...}}`, or several with `;` between.

`<|python_tag|>` before it is a special token, of which nothing is seen here.
"""

from __future__ import annotations

import json
from typing import Any

from splitserve.router.parsers.pieces import Piece, ToolCall, call_of, call_schema, json_of

ARGUMENTS_AS_TEXT = False


class Llama3Parser:
    """An answer that begins with a brace is held until its end is known."""

    def __init__(self) -> None:
        self._held = ""
        self._plain = False

    def push(self, text: str) -> list[Piece]:
        if self._plain:
            return [text] if text else []
        self._held += text
        if not self._held.strip() or self._held.lstrip().startswith("{"):
            return []
        self._plain = True
        held, self._held = self._held, ""
        return [held]

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        calls: list[Piece] = [*(_read(held) or [])]
        return calls or [held] if held else []


def parser() -> Llama3Parser:
    return Llama3Parser()


def grammar(tools: dict[str, Any]) -> str:
    """Lark's grammar of one call of `tools`, JSON schemas of arguments by name."""
    return f"start: {json_of(call_schema(tools, 'parameters'))}"


def _read(text: str) -> list[ToolCall] | None:
    decoder, calls, rest = json.JSONDecoder(), list[ToolCall](), text.strip()
    while rest:
        try:
            value, end = decoder.raw_decode(rest)
        except (ValueError, RecursionError):
            return None
        if (call := call_of(value, "parameters")) is None or "parameters" not in value:
            return None
        calls.append(call)
        rest = rest[end:].lstrip().removeprefix(";").lstrip()
    return calls
