"""Tools in a chat's body: what may be called, what must be, and calls of earlier turns."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitserve.cluster.errors import InvalidRequest
from splitserve.router.constraint import Constraint
from splitserve.router.openai_bodies import text_of
from splitserve.router.parsers.families import Family

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True)
class Tools:
    """`offered` as the template takes them, none if no tool may be called; `constraint` where an answer is not free."""

    offered: Sequence[dict[str, Any]] = ()
    constraint: Constraint | None = None


def tools_of(tools: Any, choice: Any, family: Family, form: str | None = None) -> Tools:
    """What `tools` and `tool_choice` ask for, where an answer that calls none matches the grammar `form`, if any.

    Raises InvalidRequest naming the field that is wrong.
    """
    if tools in (None, []):
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice", choice, "give tools to choose from")
        return Tools()
    if not isinstance(tools, list) or len(tools) > MAX_TOOLS:
        raise InvalidRequest("tools", tools, f"give a list of at most {MAX_TOOLS} functions")
    schemas = dict(_tool(f"tools[{index}]", tool) for index, tool in enumerate(tools))
    if len(schemas) < len(tools):
        raise InvalidRequest("tools", [tool["function"]["name"] for tool in tools], "give each another name")
    match choice:
        case "none":
            return Tools()
        case _ if family.tools is None:
            expected = "this model's chat template knows no tools; leave them out, or have model.tool_parser set"
            raise InvalidRequest("tools", list(schemas), expected)
        case None | "auto" if form is None:
            return Tools(tools)
        case None | "auto" | "required":
            wanted = schemas
        case {"type": "function", "function": {"name": str(name)}} if name in schemas:
            wanted = {name: schemas[name]}
        case _:
            raise InvalidRequest("tool_choice", choice, "give none, auto, required, or a function of tools by name")
    if form is not None and choice not in (None, "auto"):
        raise InvalidRequest("tool_choice", choice, "give it or a form of the answer, not both")
    try:
        grammar = family.call_grammar(wanted)
    except RecursionError as error:
        raise InvalidRequest("tools", list(wanted), "their parameters are nested too deep") from error
    if form is not None:
        grammar += f" | {_nested(form)}"
    return Tools(tools, Constraint("grammar", grammar, "tools"))


def calls_of(field: str, calls: Any, family: Family) -> list[dict[str, Any]]:
    """An assistant's calls of an earlier turn, as the model's template takes them."""
    if not isinstance(calls, list):
        raise InvalidRequest(field, calls, "give a list of calls")
    return [_call(f"{field}[{index}]", call, family) for index, call in enumerate(calls)]


def _nested(grammar: str) -> str:
    """One of llguidance's grammars, which are JSON or Lark, within a rule of Lark."""
    if grammar.startswith("{"):
        (only,) = json.loads(grammar)["grammars"]
        if only["lark_grammar"] is None:
            return f"%json {json.dumps(only['json_schema'])}"
        grammar = only["lark_grammar"]
    return f"%lark {{\n{grammar}\n}}"


def _call(field: str, call: Any, family: Family) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), "arguments": str(arguments)}, **about}:
            text_of(f"{field}.function.name", name)
            text_of(f"{field}.function.arguments", arguments)
        case _:
            raise InvalidRequest(field, call, "give a function with its name and arguments, both texts")
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{field}.function.arguments", arguments, "give a JSON object") from error
    function = {"name": name, "arguments": arguments if family.arguments_as_text else value}
    return {"id": str(about.get("id", "")), "type": "function", "function": function}


def _tool(field: str, tool: Any) -> tuple[str, dict[str, Any]]:
    match tool:
        case {"type": "function", "function": {"name": str(name)} as function}:
            if not NAME.fullmatch(name):
                raise InvalidRequest(f"{field}.function.name", name, "give 1 to 64 of A-Z, a-z, 0-9, _, . and -")
            schema = function.get("parameters") or NO_ARGUMENTS
            if not isinstance(schema, dict):
                raise InvalidRequest(f"{field}.function.parameters", schema, "give a JSON schema, which is an object")
            return name, schema
    raise InvalidRequest(field, tool, 'give {"type": "function", "function": {"name": ..., "parameters": ...}}')
