"""`splitserve explain` on real clusters of a tiny model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from splitserve.deploy.cluster_state import ClusterFolder
from tests.deploy.clusters import run_command, succeed, write_topology

LOAD = ("--rate", 20, "--requests", 12, "--warmup", 1, "--prompt-tokens", 20, "--output-tokens", 8)


def test_both_are_measured_and_explained(tmp_path: Path, tiny_model: Path) -> None:
    file, figures, plot = write_topology(tmp_path, tiny_model), tmp_path / "figures.json", tmp_path / "plot.svg"
    shown = succeed("explain", file, *LOAD, "--slo", "ttft=5", "--json", figures, "--plot", plot)
    assert re.search(r"1 prefill \+ 1 decode\W+2 colocated", shown)
    found = json.loads(figures.read_text())
    for side in ("split", "colocated"):
        assert (found[side]["requests"], found[side]["errors"]) == (12, {})
        assert found[side]["within_slo"] == 1.0
        assert 0.5 < found[side]["decode_batch"] <= 12
    assert [line.partition(":")[0] for line in found["explanation"][3:]] == [
        "Queueing",
        "Interference",
        "Transfer",
        "Batch size",
    ]
    assert plot.stat().st_size > 0
    assert not any(ClusterFolder(folder.name).read() for folder in (tmp_path / "state" / "splitserve").iterdir())


@pytest.mark.parametrize(
    ("pools", "arguments", "told"),
    [
        ({"decode": "layout: {tp: 2}"}, LOAD, "prefill.layout: found 1; 3 ranks of both pools make no whole engines"),
        ({}, (*LOAD, "--plot", "plot.txt"), "plot: found 'plot.txt'; give a file name that ends in"),
        ({}, (*LOAD, "--json", "/absent/f"), "json: found '/absent/f'; name a file that can be written, in a folder"),
        ({}, LOAD[2:], "one of the arguments --rate --trace is required"),
    ],
)
def test_nothing_starts_for_a_question_without_an_answer(
    tmp_path: Path, tiny_model: Path, pools: dict[str, str], arguments: tuple[object, ...], told: str
) -> None:
    refused = run_command("explain", write_topology(tmp_path, tiny_model, **pools), *arguments)
    assert refused.returncode == 2
    assert told in refused.stderr
