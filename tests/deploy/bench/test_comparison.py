"""What `explain` says of figures that are made here."""

from __future__ import annotations

import random

import pytest

from splitserve.client import Timings
from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.topology import Topology
from splitserve.deploy.bench.comparison import Name, Side, explain, table
from splitserve.deploy.bench.counterpart import colocated, named
from splitserve.deploy.bench.measure import Outcome
from splitserve.deploy.bench.plot import Run
from splitserve.deploy.bench.slo import Slo
from splitserve.deploy.bench.summary import summarize


def side(
    name: Name,
    ttft: float = 0.2,
    tpot: float = 0.02,
    *,
    queue: float = 0.0,
    stall: float = 1.0,
    slo: Slo | None = None,
    count: int = 60,
    batch: float = 4.0,
) -> Side:
    """Requests with about these times; one gap in twenty is `stall` times as long."""
    dice = random.Random(name)
    outcomes = []
    for _ in range(count):
        first = at = ttft * dice.uniform(0.8, 1.2)
        arrivals = [(at, 1)]
        for number in range(20):
            at += tpot * dice.uniform(0.9, 1.1) * (stall if number == 10 else 1.0)
            arrivals.append((at, 1))
        timings = Timings(queue, first - queue, 0.004, at - first, first, tpot, at)
        outcomes.append(Outcome(0.0, tuple(arrivals), timings=timings))
    run = Run(name, 2.0, tuple(outcomes), summarize(outcomes, 10.0, slo))
    return Side(name, "2 engines", run, batch)


def verdict(split: Side, other: Side) -> str:
    return explain(split, other)[0]


def test_the_one_with_both_latencies_shorter_is_better() -> None:
    split, other = side("split"), side("colocated", ttft=0.3, tpot=0.03)
    said = explain(split, other)
    assert said[0] == "Split is better here: both its first and its later tokens come sooner."
    assert said[1].endswith("ms when colocated: split takes 33% less.") or "split takes 3" in said[1]
    assert verdict(side("split", ttft=0.3, tpot=0.03), side("colocated")).startswith("Colocated is better here")


def test_a_trade_is_told_as_one() -> None:
    said = verdict(side("split", ttft=0.3), side("colocated", tpot=0.03))
    assert "colocated is sooner with the first token, split with all later ones" in said


def test_what_chance_may_make_is_no_verdict() -> None:
    assert verdict(side("split"), side("colocated", ttft=0.201)).startswith("Neither is better here")
    assert "no difference that chance could not make" in explain(side("split"), side("colocated"))[1]


def test_one_difference_decides_where_the_rest_is_equal() -> None:
    said = verdict(side("split"), side("colocated", tpot=0.03))
    assert said == "Split is better here, by the tokens after the first; the rest is the same for both."


def test_objectives_decide() -> None:
    slo = Slo(ttft=0.25)
    said = verdict(side("split", slo=slo), side("colocated", ttft=0.3, slo=slo))
    assert said.startswith("Split is better here: within TTFT 250 ms are 100% when split and ")
    assert verdict(side("split", slo=slo), side("colocated", slo=slo)).startswith("Neither is better here: within")


def test_causes_are_named_with_their_figures() -> None:
    queued = side("split", ttft=0.5, queue=0.4, batch=9.5)
    _, _, _, queueing, interference, transfer, batch = explain(queued, side("colocated", stall=8.0))
    assert "wait 400.0 ms" in queueing
    assert "Give prefill more" in queueing
    assert "8." in interference or "7." in interference
    assert transfer.startswith("Transfer: 4.0 ms")
    assert "carries 9.5 sequences when split, 4.0 when colocated. A larger batch" in batch


def test_the_table_has_a_column_for_each() -> None:
    slo = Slo(tpot=0.05)
    found = table(side("split", slo=slo), side("colocated", slo=slo))
    assert [column.header for column in found.columns] == ["", "split", "colocated"]
    assert [str(cell) for cell in found.columns[0].cells][-1] == "goodput, requests/s"


def test_runs_without_a_good_request_are_explained_too() -> None:
    failed = Run("split", 1.0, (Outcome(0.0, (), "UNAVAILABLE"),), summarize([Outcome(0.0, (), "UNAVAILABLE")], 1.0))
    said = explain(Side("split", "", failed, 0.0), side("colocated"))
    assert said[1] == "The first token: no request went well on both."
    assert said[0].startswith("Neither")


SPLIT = {
    "name": "a-cluster",
    "model": {"path": "m"},
    "router": {"http": "127.0.0.1:8000"},
    "prefill": {"replicas": 1, "threads": 4, "kv_memory": "1GiB", "chunk_tokens": 333},
    "decode": {"replicas": 2, "threads": 1, "kv_memory": "256MiB", "slots": 8},
}


def test_the_counterpart_has_the_same_to_run_on() -> None:
    topology = colocated(Topology.model_validate(SPLIT))
    pool = topology.decode
    assert (topology.colocated, topology.prefill, topology.roles) == (True, None, ("colocated",))
    assert (pool.replicas, pool.threads, pool.kv_memory, pool.chunk_tokens, pool.slots) == (3, 2, 2**29, 333, 8)
    assert Topology.model_validate(topology.model_dump()) == topology


def test_its_name_and_ports_are_no_other_cluster_s() -> None:
    topology = named(Topology.model_validate(SPLIT | {"name": "n" * 40}), "colocated")
    assert topology.name == "n" * 30 + "-colocated"
    assert topology.router.http is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"colocated": True, "prefill": None},
            "colocated: found True; give a topology with a prefill and a decode pool",
        ),
        ({"decode": {"device": "cuda"}}, "prefill.device: found 'cpu'; decode has cuda"),
        (
            {"decode": {"layout": {"tp": 2}, "replicas": 1}},
            "prefill.layout: found 1; 3 ranks of both pools make no whole engines of 2",
        ),
    ],
)
def test_what_has_no_counterpart_is_refused(change: dict[str, object], told: str) -> None:
    raw = {key: value for key, value in (SPLIT | change).items() if value is not None}
    with pytest.raises(InvalidRequest, match=told):
        colocated(Topology.model_validate(raw))
