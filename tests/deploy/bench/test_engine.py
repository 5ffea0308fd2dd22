"""`splitserve bench engine` on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from splitserve.deploy.cli import main
from tests.deploy.clusters import write_topology


@pytest.fixture(scope="module")
def topology(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_topology(tmp_path_factory.mktemp("bench"), tiny_model)


def test_figures_and_a_trace(topology: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures, trace = tmp_path / "figures.json", tmp_path / "trace.json"
    shape = ["--batch", "1,3", "--context", "20", "--steps", "5", "--prompts", "30x2"]
    assert main(["bench", "engine", str(topology), *shape, "--json", str(figures), "--profile", str(trace)]) == 0
    assert "ready in" in capsys.readouterr().out
    prefill, *decode = json.loads(figures.read_text())
    assert [figure["case"] for figure in (prefill, *decode)] == ["prefill 30 x 2", "decode 1", "decode 3"]
    for figure, tokens in zip((prefill, *decode), (60, 1, 3), strict=True):
        assert figure["tokens_per_s"] == pytest.approx(tokens / figure["p50_ms"] * 1e3)
        assert 0 < figure["p10_ms"] <= figure["p50_ms"] <= figure["p90_ms"]
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch: found '0'; give whole numbers from 1 on"),
        (["--batch", "two"], "batch: found 'two'; give whole numbers from 1 on"),
        (["--steps", "0"], "steps: found '0'; give whole numbers from 1 on"),
        (["--context", "-1"], "context: found '-1'; give whole numbers from 1 on"),
        (["--prompts", "64"], "prompts: found '64'; give tokens x number, such as 2048x16"),
        (["--batch", "500", "--context", "4"], "batch: found 500; it does not fit"),
        (["--context", "100000"], "give fewer than the context"),
        (["--json", "/absent/f.json"], "json: found '/absent/f.json'; name a file that can be written"),
        (["--profile", "/"], "profile: found '/'; name a file that can be written"),
    ],
)
def test_what_cannot_be_measured_is_told(
    topology: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "engine", str(topology), "--prompts", "8x1", *arguments]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
