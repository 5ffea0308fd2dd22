"""Calls as Hermes, Qwen and SmolLM2 write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

import json
from typing import Any

from splitserve.router.parsers.pieces import Sections, ToolCall, call_of, call_schema, json_of

OPENING, CLOSING = "<tool_call>", "</tool_call>"
ARGUMENTS_AS_TEXT = False


def parser() -> Sections:
    return Sections(OPENING, CLOSING, _read)


def grammar(tools: dict[str, Any]) -> str:
    """Lark's grammar of one call of `tools`, JSON schemas of arguments by name."""
    return f'start: "{OPENING}\\n" {json_of(call_schema(tools, "arguments"))} "\\n{CLOSING}"'


def _read(body: str) -> list[ToolCall] | None:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    calls = [call_of(one, "arguments") for one in (value if isinstance(value, list) else [value])]
    return None if None in calls else [call for call in calls if call]
