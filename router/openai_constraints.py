"""`response_format` and vLLM's `structured_outputs`: what a JSON body says of the answer's form."""

from __future__ import annotations

import json
from typing import Any

from splitserve.cluster.errors import InvalidRequest
from splitserve.router.constraint import Constraint
from splitserve.router.openai_bodies import text_of

ANY_OBJECT = '{"type": "object"}'


def constraint_of(response_format: Any, structured_outputs: Any) -> Constraint | None:
    """The constraint that one of the two asks for. Raises InvalidRequest naming the field that is wrong."""
    by_format = None if response_format is None else _by_format(response_format)
    if structured_outputs is None:
        return by_format
    if by_format is not None:
        raise InvalidRequest("structured_outputs", structured_outputs, "give it or response_format, not both")
    return _by_structure(structured_outputs)


def _by_format(given: Any) -> Constraint | None:
    match given:
        case {"type": "text", **rest} if not rest:
            return None
        case {"type": "json_object", **rest} if not rest:
            return Constraint("json_schema", ANY_OBJECT, "response_format")
        case {"type": "json_schema", "json_schema": {"schema": schema, **about}, **rest} if not rest:
            for name in about.keys() - {"name", "description", "strict"}:
                raise InvalidRequest(f"response_format.json_schema.{name}", about[name], "no such field; leave it out")
            return _schema(schema, "response_format.json_schema.schema")
    expected = 'give {"type": "text" or "json_object"}, or {"type": "json_schema", "json_schema": {"schema": ...}}'
    raise InvalidRequest("response_format", given, expected)


def _by_structure(given: Any) -> Constraint:
    stated = {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else {}
    match stated:
        case {"json": schema, **rest} if not rest:
            return _schema(schema, "structured_outputs.json")
        case {"json_object": True, **rest} if not rest:
            return Constraint("json_schema", ANY_OBJECT, "structured_outputs.json_object")
        case {"regex": text, **rest} if not rest:
            return Constraint("regex", text_of("structured_outputs.regex", text), "structured_outputs.regex")
        case {"grammar": text, **rest} if not rest:
            return Constraint("grammar", text_of("structured_outputs.grammar", text), "structured_outputs.grammar")
        case {"choice": list(texts), **rest} if not rest:
            field = "structured_outputs.choice"
            return Constraint.choice([text_of(f"{field}[{index}]", text) for index, text in enumerate(texts)], field)
    raise InvalidRequest("structured_outputs", given, "give one of json, json_object, regex, grammar and choice")


def _schema(schema: Any, field: str) -> Constraint:
    """A schema as an object, or as its JSON text."""
    if isinstance(schema, str):
        return Constraint("json_schema", text_of(field, schema), field)
    if not isinstance(schema, dict):
        raise InvalidRequest(field, schema, "give a JSON schema, which is an object")
    return Constraint("json_schema", json.dumps(schema), field)
