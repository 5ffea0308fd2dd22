"""The arithmetic of benchmarks.gpu_split; the benchmark itself needs two GPUs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from benchmarks.gpu_split import topology
from benchmarks.rows import Figure
from benchmarks.split_load import Answer, Load, figures
from benchmarks.split_plot import curves, vllm_curves
from benchmarks.split_report import COLOCATED, LOAD_METRICS, MODES, SPLIT, Mode, Report, load_name, vllm
from splitserve.cluster.topology_file import load_topology_file
from splitserve.deploy.plan import make_plan
from splitserve.models.resolve import load_model_config


def answer(sent: float, ttft: float, step: float, tokens: int = 11) -> Answer:
    return Answer(sent, [(sent + ttft + step * index, 1) for index in range(tokens)], joined_s=0.002)


def test_a_message_of_several_tokens_counts_them() -> None:
    burst = Answer(1.0, [(1.1, 1), (1.2, 3), (1.3, 1)])
    assert burst.ttft_s == pytest.approx(0.1)
    assert burst.tpot_s == pytest.approx(0.2 / 4)
    assert burst.gaps_s == pytest.approx([0.1, 0.1])
    assert burst.tpot_within(1.15, 2.0) == pytest.approx(0.1)
    assert burst.tpot_within(1.25, 2.0) is None


def test_figures_are_of_what_was_sent_while_it_counts() -> None:
    warming, late = answer(0.5, 9.0, 0.5), answer(3.5, 9.0, 0.5)
    counted = [answer(1.0 + index / 10, 0.1, 0.01) for index in range(10)]
    slow, refused = answer(2.5, 0.3, 0.01), Answer(2.6, error="RESOURCE_EXHAUSTED")
    load = Load([warming, *counted, slow, refused, late], begin=1.0, end=3.0)
    found = figures(load)
    assert list(found) == list(LOAD_METRICS)
    assert found["ttft p50"].value == pytest.approx(100)
    assert 100 < found["ttft p99"].value <= 300
    assert found["tpot p99"].value == pytest.approx(10)
    assert found["itl p99"].value == pytest.approx(10)
    assert found["goodput"].value == pytest.approx(10 / 2)
    assert found["throughput"].value == pytest.approx(11 * 11 / 2)
    assert found["ttft p50"].n == 11
    assert found["ttft p50"].p10 == pytest.approx(100)
    assert found["ttft p99"].p10 < found["ttft p99"].p90
    assert load.share_within_slo == pytest.approx(10 / 12)


def test_a_load_of_failures_has_no_figures() -> None:
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        figures(Load([Answer(1.0, error="UNAVAILABLE")], 0.0, 2.0))


def test_rows_name_their_peers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    for module in ("rows", "split_report"):
        monkeypatch.setattr(f"benchmarks.{module}.hardware", lambda: "2 x NVIDIA H100 80GB HBM3")
    report = Report()
    for value, mode in zip((50.0, 40.0), MODES, strict=True):
        for rate in (24.0, 30.0):
            load = load_name(2048, 128, rate)
            report.add_load(load, rate, mode, dict.fromkeys(LOAD_METRICS, Figure.of([value])))
    lines = (tmp_path / "split.jsonl").read_text().splitlines()
    peers = {
        (row["case"], row["metric"].split(" (")[0]): (row["peer"], row["peer_value"]) for row in map(json.loads, lines)
    }
    assert peers["v2lite-bf16 2048+128, 24 req/s, 1P1D", "ttft p50"] == ("vllm", vllm(24, SPLIT, "ttft p50"))
    assert peers["v2lite-bf16 2048+128, 24 req/s, 1P1D", "goodput"] == (COLOCATED, 50.0)
    assert peers["v2lite-bf16 2048+128, 30 req/s, 1P1D", "ttft p50"] == (COLOCATED, 50.0)
    assert peers["v2lite-bf16 2048+128, 30 req/s, 2 colocated", "ttft p50"] == ("none", None)
    drawn = curves(lines)
    assert drawn[SPLIT, "ttft p50"] == [(24.0, 40.0), (30.0, 40.0)]
    assert set(vllm_curves()) <= set(drawn)
    assert curves(line.replace("H100", "H200") for line in lines) == {}


def test_other_gpus_have_no_peer_in_vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.rows.RESULTS", tmp_path)
    monkeypatch.setattr("benchmarks.split_report.hardware", lambda: "2 x NVIDIA H200")
    Report().add("split", "a load", SPLIT, "ttft p50", Figure.of([1.0]), ("vllm", 2.0))
    assert json.loads((tmp_path / "split.jsonl").read_text())["peer"] == "none"


@pytest.mark.parametrize("mode", MODES)
def test_its_topologies_fit_on_two_gpus(mode: Mode, tmp_path: Path) -> None:
    file = tmp_path / "topology.yaml"
    file.write_text(yaml.safe_dump(topology(tmp_path, mode)))
    plan = make_plan(load_topology_file(file), load_model_config(str(tmp_path)))
    assert plan.gpus == 2
    assert [link.transport for link in plan.links] == ([] if mode == COLOCATED else ["cuda_ipc"])
