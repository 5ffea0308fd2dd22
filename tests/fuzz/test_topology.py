"""Topology files: any bytes load, or are explained line by line, in bounded time and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given

from splitserve.cluster.errors import TopologyErrors
from splitserve.cluster.topology_file import load_topology_file
from tests.fuzz.mutate import bounded, changed, corpus, fuzz, mutated, seeds

TOPOLOGIES = Path(__file__).parents[2] / "deploy" / "topologies"
SHIPPED = [path.read_bytes() for path in sorted(TOPOLOGIES.glob("*.yaml"))]
SEEDS = [text for text in [*seeds("topology"), *SHIPPED] if len(text) < 2000]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("topology") / "t.yaml"


def check(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    try:
        with bounded():
            read = load_topology_file(file)
    except TopologyErrors as faults:
        breaks = (b"\n", b"\r", "\x85".encode(), "\u2028".encode(), "\u2029".encode())
        lines = 1 + sum(map(content.count, breaks))
        for fault in faults.errors:
            assert 1 <= fault.line <= lines
            assert fault.field
            assert fault.expected
            assert len(str(fault)) < 2000
        return
    topology = read.topology
    assert topology.staging > 0
    assert topology.router.grpc_address(topology.router.replicas - 1)
    assert all(topology.pool(role) and topology.gpu_staging(role) >= 0 for role in topology.roles)


@pytest.mark.parametrize("path", corpus("topology"), ids=lambda path: path.name)
def test_corpus(path: Path, file: Path) -> None:
    check(file, path.read_bytes())


@fuzz
@given(content=mutated(SEEDS))
def test_spoilt_bytes(file: Path, content: bytes) -> None:
    check(file, content)


@fuzz
@given(tree=changed([yaml.safe_load(text) for text in SHIPPED]))
def test_spoilt_values(file: Path, tree: dict[str, Any]) -> None:
    check(file, yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"))
