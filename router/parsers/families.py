"""Which parsers a model's answers go through: those that the topology names, else what its chat template shows."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

from splitserve.cluster.topology_sections import Model
from splitserve.router.parsers import deepseek, hermes, llama3, think
from splitserve.router.parsers.pieces import ToolParser

TOOLS: dict[str, ModuleType] = {"hermes": hermes, "deepseek": deepseek, "llama3": llama3}
SIGNS = {"hermes": hermes.OPENING, "deepseek": deepseek.OPENING, "llama3": '"parameters":'}


@dataclass(frozen=True)
class Family:
    """How a model writes calls (None: it does not), and whether it writes down its reasoning."""

    tools: str | None = None
    reasons: bool = False

    @classmethod
    def of(cls, settings: Model, template: str) -> Family:
        """The family of a model with this chat template."""
        tools: str | None = settings.tool_parser
        if tools == "auto":
            tools = next((name for name, sign in SIGNS.items() if sign in template), None)
        reasons = settings.reasoning_parser == "think"
        if settings.reasoning_parser == "auto":
            reasons = think.CLOSING in template
        return cls(None if tools == "none" else tools, reasons)

    @property
    def arguments_as_text(self) -> bool:
        """Whether its template takes a call's arguments as text and not as an object."""
        return self.tools is not None and bool(TOOLS[self.tools].ARGUMENTS_AS_TEXT)

    def tool_parser(self) -> ToolParser:
        """For one answer of a family that writes calls."""
        assert self.tools is not None
        parser: ToolParser = TOOLS[self.tools].parser()
        return parser

    def call_grammar(self, tools: dict[str, Any]) -> str:
        """Lark's grammar of an answer that calls one of `tools`, JSON schemas of arguments by name."""
        assert self.tools is not None
        grammar: str = TOOLS[self.tools].grammar(tools)
        return grammar
