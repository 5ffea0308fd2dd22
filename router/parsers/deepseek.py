"""Calls as DeepSeek V3 and R1 write them, between their own tags, and the shorter form of V3.1."""

from __future__ import annotations

import json
from typing import Any

from splitserve.router.parsers.pieces import Sections, ToolCall, json_of

OPENING, CLOSING = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
ARGUMENTS_AS_TEXT = True
FENCE, FENCE_END = "\n```json\n", "\n```"


def parser() -> Sections:
    return Sections(OPENING, CLOSING, _read)


def grammar(tools: dict[str, Any]) -> str:
    """Lark's grammar of one call of `tools`, JSON schemas of arguments by name."""
    heads = {name: json.dumps(name + "\n```json\n", ensure_ascii=False) for name in tools}
    calls = " | ".join(f"{heads[name]} {json_of(schema)}" for name, schema in tools.items())
    return f'start: "{OPENING}{CALL}function{SEPARATOR}" ({calls}) "\\n```{END}{CLOSING}"'


def _read(body: str) -> list[ToolCall] | None:
    before, *parts = body.split(CALL)
    calls = [_call(part) for part in parts]
    return None if before.strip() or None in calls else [call for call in calls if call]


def _call(part: str) -> ToolCall | None:
    """The call that `part` is, up to its end and blanks behind it."""
    inner, end, behind = part.partition(END)
    name, separator, arguments = inner.partition(SEPARATOR)
    if name == "function" and FENCE in arguments and arguments.endswith(FENCE_END):
        name, _, arguments = arguments.removesuffix(FENCE_END).partition(FENCE)
    if not (name and separator and end) or behind.strip():
        return None
    try:
        is_object = isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return None
    return ToolCall(name, arguments.strip()) if is_object else None
