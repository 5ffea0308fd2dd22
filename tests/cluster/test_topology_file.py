from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from splitserve.cluster.errors import TopologyError, TopologyErrors
from splitserve.cluster.topology_file import (
    MAX_FILE_BYTES,
    TopologyFile,
    load_topology,
    load_topology_file,
    topology_json_schema,
)

TOPOLOGIES = Path(__file__).parents[2] / "deploy" / "topologies"
SHIPPED = sorted(TOPOLOGIES.glob("*.yaml"))
SCHEMA = TOPOLOGIES / "topology.schema.json"

VALID = """\
# a comment
name: demo
model: {path: some-model, dtype: bfloat16}
router:
  grpc: localhost:50061
  default_deadline_s: 30
decode:
  layout:
    tp: 2
  kv_memory: 1.5GiB
security:
  curve: on
"""


def faults_of(path: Path, content: str | bytes) -> list[TopologyError]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TopologyErrors) as caught:
        load_topology(path)
    assert all(error.file == str(path) for error in caught.value.errors)
    assert str(caught.value).splitlines() == [str(error) for error in caught.value.errors]
    return list(caught.value.errors)


def test_fields_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(VALID)
    file = load_topology_file(path)
    assert file.topology.decode.kv_memory == 3 * 2**29
    assert file.topology.router.default_deadline_s == 30.0
    assert file.topology.security.curve == "on"  # YAML 1.1 would read this as true
    assert file.error("decode.layout.tp", 2, "expected 1").line == 9
    assert file.error("decode.layout.ep", 2, "expected 1").line == 8
    assert file.error("prefill.layout.tp", 2, "expected 1").line == 1
    assert str(file.error("model.dtype", "x", "expected y")) == f"{path}:3: model.dtype: found x; expected y"


def test_an_error_about_a_topology_that_is_in_no_file_has_a_line_all_the_same(tmp_path: Path) -> None:
    """That of a cluster which is scaled."""
    file = tmp_path / "t.yaml"
    file.write_text("name: t\nmodel: {path: m}\n")
    assert TopologyFile(str(file), load_topology(file), {}).error("hosts.gpus", 1, "2").line == 1


def test_a_list_of_capacities(tmp_path: Path) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(VALID.replace("  layout:\n    tp: 2\n", "  capacities: [8, 32]\n"))
    assert load_topology(path).decode.capacities == (8, 32)


def test_all_faults_are_told_together_in_order_with_their_place(tmp_path: Path) -> None:
    text = """\
name: Demo
model: {pth: x, dtype: float64, context: "3"}
router:
  replicas: 0
  default_deadline_s: .inf
  quite_other: 1
prefill:
  layout: 3
  kv_memory: 3XB
decode:
  slots: 1000
"""
    faults = faults_of(tmp_path / "t.yaml", text)
    told = {error.field: (error.line, error.found, error.expected) for error in faults}
    assert [error.line for error in faults] == sorted(error.line for error in faults)
    assert told.keys() == {
        *("name", "model.pth", "model.path", "model.dtype", "model.context", "router.replicas", "prefill.kv_memory"),
        *("router.default_deadline_s", "router.quite_other", "prefill.layout", "decode.slots"),
    }
    assert told["name"][:2] == (1, "'Demo'")
    assert told["model.pth"] == (2, "an unknown field", "did you mean `path`?")
    assert told["model.path"][:2] == (2, "nothing")
    assert "Hugging Face folder" in told["model.path"][2]
    assert told["model.dtype"][:2] == (2, "'float64'")
    assert told["model.dtype"][2].startswith("it should be 'float32' or 'bfloat16' (")
    assert told["router.replicas"][:2] == (4, "0")
    assert told["router.quite_other"][2].startswith("expected one of replicas, grpc, http, ")
    assert told["prefill.layout"][2] == "expected a mapping of fields: how a replica's ranks share the model"
    assert told["prefill.kv_memory"][0] == 9
    assert "at most max_sequences, 64" in told["decode.slots"][2]


def test_a_field_of_the_other_mode_is_told_at_its_own_line(tmp_path: Path) -> None:
    text = "name: a\nmodel: {path: b}\ndecode:\n  slots: 4\n  chunk_tokens: 7\n"
    (fault,) = faults_of(tmp_path / "t.yaml", text)
    assert (fault.line, fault.field, fault.found) == (5, "decode.chunk_tokens", "7")


BOMB = "a: &a [1, 1]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n"


@pytest.mark.parametrize(
    ("content", "line", "field", "message"),
    [
        ("name: a\nmodel: {path: b}\nname: c\n", 3, "name", "line 1"),
        ("name: a\nmodel:\n  path: b\n  path: c\n", 4, "model.path", "line 3"),
        (BOMB, 2, "(file)", "alias"),
        ("name: a\nmodel: &m {path: b, context: *m}\n", 2, "(file)", "alias"),
        ("name: a\n---\nname: b\n", 2, "(file)", "document"),
        ("", 1, "(file)", "nothing"),
        ("# only a comment\n", 1, "(file)", "nothing"),
        ("- name\n", 1, "(file)", "a list"),
        ("hello", 1, "(file)", "a single value"),
        (b"name: a\nmodel: \xff\n", 2, "(file)", "0xff"),
        ("name: a\nmodel: \0\n", 2, "(file)", "printable"),
        ("name: a\nmodel: [\n", 3, "(file)", "document"),
        ("name: a\n  model: b\n", 2, "(file)", "mapping values"),
        ("name: a\n1: b\n[x]: c\n", 3, "(file)", "odd key"),
        ("name: a\n? {b: c}\n: d\n", 2, "(file)", "odd key"),
        ("name: !!python/object:os.system a\n", 1, "name", "python/object"),
        ("name: !!timestamp 2\n", 1, "name", "timestamp"),
        ("name: a\nmodel: !!set {path}\n", 2, "model", "tag"),
        ("name: a\nmodel: {context: !!int x}\n", 2, "model.context", "tag"),
        ("name: !!str [a]\n", 1, "name", "tag"),
        ("colocated: !!bool 1\n", 1, "colocated", "tag"),
        ('name: a\nmodel: {path: "\\UFFFFFFFF"}\n', 2, "(file)", "document"),
        ("%YAML 1." + "9" * 5000 + "\n---\nname: a\n", 1, "(file)", "document"),
        ("a: " + "[" * 50_000, 1, "(file)", "too deep"),
        ("a: [" + "1," * 20_000 + "]", 1, "(file)", "too many"),
        (b"#" * (MAX_FILE_BYTES + 1), 1, "(file)", "1 MiB"),
    ],
)
def test_unsafe_and_broken_yaml(tmp_path: Path, content: str | bytes, line: int, field: str, message: str) -> None:
    (fault,) = faults_of(tmp_path / "t.yaml", content)
    assert (fault.line, fault.field) == (line, field)
    assert message in str(fault)


@pytest.mark.parametrize("path", ["missing.yaml", ".", "\0"])
def test_unreadable_files(tmp_path: Path, path: str) -> None:
    with pytest.raises(TopologyErrors, match="readable topology file"):
        load_topology(f"{tmp_path}/{path}")


def test_odd_strings_are_told_not_raised(tmp_path: Path) -> None:
    (fault,) = faults_of(tmp_path / "t.yaml", 'name: a\nmodel: {path: "\\uD800"}\n')
    assert fault.field == "model.path"
    (fault,) = faults_of(tmp_path / "t.yaml", 'name: a\n"\\uD800": 1\n')
    assert fault.line == 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_topologies_load_and_satisfy_the_schema(path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert load_topology(path).name == path.stem
    assert path.read_text().startswith("# yaml-language-server: $schema=topology.schema.json\n")
    jsonschema.Draft202012Validator(schema).validate(yaml.safe_load(path.read_text()))


def test_shipped_schema_is_current() -> None:
    assert len(SHIPPED) == 11
    current = topology_json_schema()
    jsonschema.Draft202012Validator.check_schema(current)
    assert json.loads(SCHEMA.read_text()) == current, "write topology_json_schema() to topology.schema.json"


def test_schema_describes_every_field_and_refuses_unknown_ones() -> None:
    sections = {"Topology": topology_json_schema(), **topology_json_schema()["$defs"]}
    for name, section in sections.items():
        assert section["additionalProperties"] is False, name
        for field, schema in section["properties"].items():
            assert schema.get("description"), f"{name}.{field} has no description"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"name": "a", "model": {"pth": "b"}}, sections["Topology"])


TOKENS = [
    "\n",
    " ",
    "  ",
    ":",
    "- ",
    "[",
    "]",
    "{",
    "}",
    "&a ",
    "*a",
    "!!int ",
    "|\n",
    '"',
    "'",
    "#",
    "%",
    "? ",
    "---\n",
]
TOKENS += [
    "null",
    "true",
    "on",
    "1e999",
    "-1",
    "9" * 400,
    "\t",
    "\0",
    "\ud7ff",
    "<<",
    "0x1F",
    "1:30",
    "2026-01-01",
    "\\U",
]


def mutate(text: str, seed: int) -> str:
    """A few random cuts, copies and insertions."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(text) + 1), rng.randint(0, 12)
        match rng.randrange(3):
            case 0:
                text = text[:at] + text[at + length :]
            case 1:
                text = text[:at] + rng.choice(TOKENS) + text[at:]
            case _:
                text = text[:at] + text[at : at + length] * rng.randint(2, 4) + text[at + length :]
    return text


def loads_or_explains(path: Path, content: bytes) -> bool:
    """Whether `content` loads; where it does not, TopologyErrors is all that may come out."""
    path.write_bytes(content)
    try:
        load_topology(path)
    except TopologyErrors as error:
        faults = error.errors
    else:
        return True
    assert faults
    assert all(1 <= fault.line <= content.count(b"\n") + 2 for fault in faults)
    assert all(fault.field and fault.found and fault.expected for fault in faults)
    return False


def test_random_mutations_load_or_explain(tmp_path: Path) -> None:
    outcomes = [loads_or_explains(tmp_path / "t.yaml", mutate(VALID, seed).encode()) for seed in range(800)]
    assert 20 < sum(outcomes) < 780  # both outcomes were met


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["name", "model", "hosts", "router", "colocated", "prefill", "decode", "security", "kv_transfer"]
)
INNER = st.sampled_from(["path", "count", "grpc", "replicas", "slo", "layout", "kv_memory", "slots", "bind", "tls"])


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(FIELDS, JSON_VALUES | st.dictionaries(INNER, JSON_VALUES, max_size=3), max_size=4))
def test_any_values_load_or_explain(tmp_path: Path, raw: dict[str, Any]) -> None:
    loads_or_explains(tmp_path / "t.yaml", yaml.safe_dump(raw, allow_unicode=True).encode("utf-8", "surrogatepass"))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_load_or_explain(tmp_path: Path, content: bytes) -> None:
    assert not loads_or_explains(tmp_path / "t.yaml", content)
