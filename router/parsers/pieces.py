"""What a model's text is made of, and how a parser tells: piece by piece, however the text is cut.

A parser is pure: the texts of all its pieces, joined, and their calls depend on the whole text alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

WHITESPACE = r"[ \n\r\t]{0,32}"  # within JSON: bounded, because models that may write blanks for ever sometimes do


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is the text of a JSON object."""

    name: str
    arguments: str


Piece = str | ToolCall


class ToolParser(Protocol):
    def push(self, text: str) -> list[Piece]:
        """What is certain now: content as text, and whole calls."""

    def finish(self) -> list[Piece]:
        """The rest, now that nothing follows."""


class Sections:
    """Content, and calls in sections from `opening` to `closing`, which `read` reads.

    A section that cannot be read is content. Blanks before and behind sections are nothing.
    """

    def __init__(self, opening: str, closing: str, read: Callable[[str], list[ToolCall] | None]) -> None:
        self._opening, self._closing, self._read = opening, closing, read
        self._held = self._blanks = ""
        self._inside = False
        self._called = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while True:
            before, tag, behind = self._held.partition(self._closing if self._inside else self._opening)
            if not tag:
                break
            self._held = behind
            pieces += self._section(before, tag) if self._inside else [before.rstrip()]
            self._inside = not self._inside
            if self._inside:
                self._blanks = before[len(before.rstrip()) :]
        if not self._inside:
            shown = self._held[: len(self._held) - held_back(self._held, self._opening)].rstrip()
            self._held = self._held[len(shown) :]
            pieces.append(shown)
        return [piece for piece in pieces if piece]

    def finish(self) -> list[Piece]:
        rest, self._held = self._held, ""
        if self._inside:
            self._inside = False
            return self._section(rest, "")
        return [] if self._called and not rest.strip() else [piece for piece in [rest] if piece]

    def _section(self, body: str, closing: str) -> list[Piece]:
        calls = self._read(body)
        if not calls:
            return [self._blanks + self._opening + body + closing]
        self._called = True
        return list(calls)


def held_back(text: str, tag: str) -> int:
    """Characters at the end of `text` that may be the beginning of `tag`."""
    return next((size for size in range(min(len(tag) - 1, len(text)), 0, -1) if tag.startswith(text[-size:])), 0)


def call_of(value: Any, arguments: str) -> ToolCall | None:
    """The call that an object with a `name` and, named so, `arguments` is."""
    match value:
        case {"name": str(name)} if name and isinstance(value.get(arguments, {}), dict):
            return ToolCall(name, json.dumps(value.get(arguments, {}), ensure_ascii=False))
    return None


def json_of(schema: dict[str, Any]) -> str:
    """Lark's rule for JSON that matches `schema`."""
    return f"%json {json.dumps(schema | {'x-guidance': {'whitespace_pattern': WHITESPACE}})}"


def call_schema(tools: dict[str, Any], arguments: str) -> dict[str, Any]:
    """JSON schema of one call of `tools`, schemas of their `arguments` by name."""
    calls = []
    for index, (name, schema) in enumerate(tools.items()):
        moved = _moved(schema, f"#/anyOf/{index}/properties/{arguments}")
        properties = {"name": {"const": name}, arguments: moved}
        call = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        calls.append(call)
    return {"anyOf": calls}


def _moved(schema: Any, to: str) -> Any:
    """`schema` with its references to itself, for where it lies at the JSON pointer `to` of a larger one."""
    if isinstance(schema, list):
        return [_moved(value, to) for value in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, to) for name, value in schema.items()}
    match moved.get("$ref"):
        case str(reference) if reference.startswith("#"):
            moved["$ref"] = to + reference.removeprefix("#")
    return moved
