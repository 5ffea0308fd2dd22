"""Calls as DeepSeek V3 and R1 write them, between their own tags, and the shorter form of V3.1."""

from __future__ import annotations

import json
import re
from typing import Any

from splitserve.router.parsers.pieces import Sections, ToolCall

OPENING, CLOSING = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
ARGUMENTS_AS_TEXT = True
_CALL = re.compile(f"{CALL}(?:function{SEPARATOR}(.+?)\n```json\n(.*?)\n```|(.+?){SEPARATOR}(.*?)){END}", re.DOTALL)


def parser() -> Sections:
    return Sections(OPENING, CLOSING, _read)


def grammar(tools: dict[str, Any]) -> str:
    """Lark's grammar of one call of `tools`, JSON schemas of arguments by name."""
    heads = {name: json.dumps(name + "\n```json\n", ensure_ascii=False) for name in tools}
    calls = " | ".join(f"{heads[name]} %json {json.dumps(schema)}" for name, schema in tools.items())
    return f'start: "{OPENING}{CALL}function{SEPARATOR}" ({calls}) "\\n```{END}{CLOSING}"'


def _read(body: str) -> list[ToolCall] | None:
    calls = []
    for match in _CALL.finditer(body):
        name, arguments = match[1] or match[3], match[2] or match[4]
        try:
            if not isinstance(json.loads(arguments), dict):
                return None
        except (ValueError, RecursionError):
            return None
        calls.append(ToolCall(name, arguments.strip()))
    return None if _CALL.sub("", body).strip() else calls
