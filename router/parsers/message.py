"""One answer of an assistant, split into reasoning, content and calls as it grows."""

from __future__ import annotations

from splitserve.router.parsers.families import Family
from splitserve.router.parsers.pieces import Piece, ToolCall
from splitserve.router.parsers.think import ThinkParser


class MessageParser:
    """`reasons` and `may_call` say what to look for; `inside`: the prompt has opened the reasoning.

    `calls` counts those found so far.
    """

    def __init__(self, family: Family, *, reasons: bool, inside: bool, may_call: bool) -> None:
        self._think = ThinkParser(inside) if reasons else None
        self._tools = family.tool_parser() if may_call else None
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
        self.calls += len(calls)
        return reasoning, "".join(piece for piece in pieces if isinstance(piece, str)), calls
