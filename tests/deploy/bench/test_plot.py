from __future__ import annotations

from pathlib import Path

import pytest

from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.measure import Outcome
from splitserve.deploy.bench.plot import Run, check_plot, draw
from splitserve.deploy.bench.slo import Slo
from splitserve.deploy.bench.summary import summarize


def run(rate: float, outcomes: list[Outcome], slo: Slo | None) -> Run:
    return Run(f"{rate:g} requests/s", rate, tuple(outcomes), summarize(outcomes, 2.0, slo))


@pytest.mark.parametrize("slo", [None, Slo(ttft=0.2)])
def test_a_picture_names_its_runs_and_what_it_shows(tmp_path: Path, slo: Slo | None) -> None:
    good = [Outcome(0.0, ((0.1 * index, 1), (0.2 * index, 3))) for index in range(1, 9)]
    draw([run(1, good, slo), run(2, [Outcome(0.0, (), "UNAVAILABLE")], slo)], tmp_path / "plot.svg")
    picture = (tmp_path / "plot.svg").read_text()
    assert picture.startswith("<?xml")
    assert "<!-- 1 requests/s -->" in picture
    assert "<!-- time to first token (TTFT), ms -->" in picture
    assert ("<!-- within TTFT 200 ms -->" in picture) == (slo is not None)


@pytest.mark.parametrize(("name", "told"), [("a.txt", "ends in .png"), ("absent/a.png", "in a folder that exists")])
def test_a_picture_that_cannot_be_written_is_told_before_the_load(tmp_path: Path, name: str, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told):
        check_plot(tmp_path / name)
