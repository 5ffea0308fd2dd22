"""The docs site builds without a warning, and what is made of the code is all there."""

from __future__ import annotations

import os
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest

from splitserve.cluster.topology_file import topology_json_schema
from splitserve.deploy.cli import make_parser
from tools.docs_site import subcommands

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def page(site: Path, name: str) -> str:
    return unescape((site / name / "index.html").read_text())


def test_every_field_of_a_topology_is_explained(site: Path) -> None:
    schema, text = topology_json_schema(), page(site, "reference/topology")
    fields = {name: field for part in [schema, *schema["$defs"].values()] for name, field in part["properties"].items()}
    assert len(fields) > 40
    for name, field in fields.items():
        assert f"<code>{name}</code>" in text
        assert field["description"].split("`")[0] in text


def test_every_command_is_listed_with_its_help(site: Path) -> None:
    text = page(site, "reference/command-line")
    listed = [name for name, _ in subcommands(make_parser())]
    assert {"splitserve up", "splitserve bench"} <= set(listed)
    for name in listed:
        assert f"usage: {name} " in text


def test_the_benchmarks_show_their_rows(site: Path) -> None:
    text = page(site, "reference/benchmarks")
    for file in (ROOT / "benchmarks" / "results").glob("*.jsonl"):
        assert f'id="{file.stem}"' in text
        assert text.count("<tr>") > 500
    assert (site / "reference" / "decode.svg").stat().st_size > 10_000


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for file in site.rglob("*.html"):
        text = file.read_text()
        for mark in ('<script src="http', '<link rel="stylesheet" href="http', '<img src="http', "fonts.googleapis"):
            assert mark not in text, file
