"""One answer of an assistant, split into reasoning, content and calls as it grows."""

from __future__ import annotations

from splitserve.router.parsers.families import Family
from splitserve.router.parsers.pieces import Piece, ToolCall
from splitserve.router.parsers.think import ThinkParser


class MessageParser:
    """`reasons` and `most_calls` (None: any number) say what to look for; `inside`: the prompt opened the reasoning.

    `calls` counts those found so far. More than `most_calls` are left out.
    """

    def __init__(self, family: Family, *, reasons: bool, inside: bool, most_calls: int | None) -> None:
        self._think = ThinkParser(inside) if reasons else None
        self._tools = None if most_calls == 0 else family.tool_parser()
        self._most_calls = most_calls
        self.calls = 0

    def push(self, text: str, *, last: bool) -> tuple[str, str, tuple[ToolCall, ...]]:
        """What is certain now of (reasoning, content, calls)."""
        reasoning = ""
        if self._think is not None:
            reasoning, text = self._think.push(text, last=last)
        pieces: list[Piece] = [text] if self._tools is None else self._tools.push(text)
        if last and self._tools is not None:
            pieces += self._tools.finish()
        calls = tuple(piece for piece in pieces if isinstance(piece, ToolCall))
        if self._most_calls is not None:
            calls = calls[: self._most_calls - self.calls]
        self.calls += len(calls)
        return reasoning, "".join(piece for piece in pieces if isinstance(piece, str)), calls
