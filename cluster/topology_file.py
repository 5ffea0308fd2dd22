"""Reads a topology file, so that every fault is told with its line.

The YAML is a safe subset: one document, text keys, no aliases, no tags; true and false are the only booleans, so
that `curve: on` is text.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from splitserve.cluster.errors import TopologyError, TopologyErrors
from splitserve.cluster.topology import Topology

MAX_FILE_BYTES = 2**20
MAX_NODES = 10_000
MAX_DEPTH = 20

FieldPath = tuple[str | int, ...]
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class TopologyFile:
    """A topology and where it was read: `lines` maps the path of each field in the file to its line, from 1."""

    path: str
    topology: Topology
    lines: dict[FieldPath, int]

    def error(self, field: str, found: object, expected: str) -> TopologyError:
        """An error about a dotted `field`, at its line or at that of the nearest section in the file."""
        return TopologyError(self.path, self._line(field), field, str(found), expected)

    def place(self, field: str) -> str:
        """What such an error begins with."""
        return f"{self.path}:{self._line(field)}: {field}"

    def _line(self, field: str) -> int:
        return _nearest_line(self.lines, tuple(field.split(".")))


def load_topology(path: str | Path) -> Topology:
    """Read and check a topology file. Raises TopologyErrors with everything that is wrong with it."""
    return load_topology_file(path).topology


def load_topology_file(path: str | Path) -> TopologyFile:
    """Like `load_topology`, and keeps the lines for checks against the model."""
    file = str(path)
    document = _Document(file)
    try:
        raw = document.read(_read_text(file))
    except TopologyError as error:
        raise TopologyErrors([error]) from error
    try:
        return TopologyFile(file, Topology.model_validate(raw), document.lines)
    except ValidationError as error:
        errors = [_explain(file, document.lines, details) for details in error.errors()]
        raise TopologyErrors(sorted(errors, key=lambda fault: fault.line)) from error


def topology_json_schema() -> dict[str, Any]:
    """JSON schema of a topology file, for editors."""
    return {"$schema": SCHEMA_DIALECT, **Topology.model_json_schema()}


def _read_text(file: str) -> str:
    try:
        with open(file, "rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise TopologyError(file, 1, "(file)", f"{reason}", "expected a readable topology file") from error
    if len(data) > MAX_FILE_BYTES:
        raise TopologyError(file, 1, "(file)", "over 1 MiB", "a topology is a few kilobytes; name another file")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x}"
        raise TopologyError(file, line, "(file)", found, "expected UTF-8 text") from error


_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "null": lambda _: None,
    "bool": {"true": True, "false": False}.__getitem__,
    "int": int,
    "float": float,
}


class _Loader(yaml.SafeLoader):
    """Composes nodes; scalars resolve as in YAML 1.2, and what a topology never needs is refused."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (PyYAML's own way)

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="an alias: write the value out instead", problem_mark=self.get_mark())
        if self.depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise yaml.MarkedYAMLError(problem="values too deep or too many", problem_mark=self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _kind, _pattern, _first in (
    ("null", r"null|~|", ["n", "~", ""]),
    ("bool", r"true|false", list("tf")),
    ("int", r"[-+]?(0|[1-9][0-9]{0,17})", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)


class _Document:
    """Turns composed nodes into plain values and remembers the line of each."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.lines: dict[FieldPath, int] = {(): 1}

    def read(self, text: str) -> dict[str, Any]:
        root = self._compose(text)
        if not isinstance(root, yaml.MappingNode):
            found = "nothing" if root is None else "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
            raise TopologyError(self.file, 1, "(file)", found, "expected fields such as `name:` and `model:`")
        return self._mapping(root, ())

    def _compose(self, text: str) -> yaml.Node | None:
        loader = None
        try:
            loader = _Loader(text)
            return loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise TopologyError(self.file, line, "(file)", f"{error.problem}", "expected one YAML document") from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise TopologyError(self.file, line, "(file)", error.reason, "expected printable text") from error
        except (ValueError, OverflowError) as error:  # PyYAML lets these out for absurd escapes and versions
            line = loader.line + 1 if loader else 1
            raise TopologyError(self.file, line, "(file)", str(error), "expected one YAML document") from error

    def _value(self, node: yaml.Node, path: FieldPath) -> Any:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self._value(child, (*path, index)) for index, child in enumerate(node.value)]
        try:
            return _SCALARS[kind if isinstance(node, yaml.ScalarNode) else "unknown"](node.value)
        except (KeyError, ValueError) as error:  # only an explicit tag gets here
            expected = "expected plain text, a number, true, false or null"
            raise self._error(node.start_mark.line + 1, path, f"tag {node.tag!r:.80}", expected) from error

    def _mapping(self, node: yaml.MappingNode, path: FieldPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or not re.fullmatch(r"[ -~]{1,100}", key):
                raise self._error(line, path, "an odd key", "expected the plain name of a field")
            if key in values:
                first = self.lines[*path, key]
                raise self._error(line, (*path, key), "the key twice", f"it stands on line {first} already: keep one")
            self.lines[*path, key] = line
            values[key] = self._value(value_node, (*path, key))
        return values

    def _error(self, line: int, path: FieldPath, found: str, expected: str) -> TopologyError:
        return TopologyError(self.file, line, _dotted(path), found, expected)


def _explain(file: str, lines: dict[FieldPath, int], details: ErrorDetails) -> TopologyError:
    """One pydantic error as the file's reader needs it."""
    path = details["loc"]
    found, description = f"{details['input']!r:.80}", _description(path)
    match details["type"]:
        case "extra_forbidden":
            found, expected = "an unknown field", _suggestion(path)
        case "missing":
            found, expected = "nothing", f"add it: {description}"
        case "model_type" | "dict_type" | "model_attributes_type":
            expected = f"expected a mapping of fields: {description}"
        case "inner_field":
            context = details["ctx"]
            path, found, expected = (*path, context["field"]), str(context["found"]), context["expected"]
        case "value_error":
            expected = str(details["ctx"]["error"])
        case _:
            expected = f"{re.sub('^[A-Z][a-z]+ should', 'it should', details['msg'])} ({description})"
    return TopologyError(file, _nearest_line(lines, path), _dotted(path), found, expected)


def _suggestion(path: FieldPath) -> str:
    section = _section(path[:-1])
    names = list(section.model_fields) if section else []
    close = difflib.get_close_matches(str(path[-1]), names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"expected one of {', '.join(names)}"


def _description(path: FieldPath) -> str:
    section = _section(path[:-1]) if path else None
    field = section.model_fields.get(str(path[-1])) if section else None
    return (field.description if field else None) or "one cluster"


def _section(path: FieldPath) -> type[BaseModel] | None:
    """The model that describes the mapping at `path`."""
    section: type[BaseModel] | None = Topology
    for name in path:
        field = section.model_fields.get(str(name)) if section else None
        section = next(_models(field.annotation), None) if field else None
    return section


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            yield candidate


def _nearest_line(lines: dict[FieldPath, int], path: FieldPath) -> int:
    return next((lines[path[:length]] for length in range(len(path), -1, -1) if path[:length] in lines), 1)


def _dotted(path: FieldPath) -> str:
    return ".".join(str(part) for part in path) or "(file)"
