from __future__ import annotations

import re

import pytest

from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.measure import Outcome
from splitserve.deploy.bench.slo import Slo, parse_slo
from splitserve.deploy.bench.summary import percentile, summarize, summary_table


def test_percentiles_interpolate() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1
    assert percentile(values, 50) == 2.5
    assert percentile(values, 100) == 4
    assert percentile([7.0], 99) == 7


def test_summary_counts_what_ended_well() -> None:
    good = Outcome(0.0, ((0.1, 1), (0.2, 2), (0.4, 2)))
    single = Outcome(0.0, ((0.3, 1),))
    failed = Outcome(0.0, ((0.1, 1),), "UNAVAILABLE")
    summary = summarize([good, single, failed], wall_s=2.0)
    assert summary.requests == 3
    assert summary.errors == {"UNAVAILABLE": 1}
    assert summary.tokens_per_s == 3.0
    assert summary.requests_per_s == 1.0
    assert summary.ttft_s.mean == pytest.approx(0.2)
    assert summary.tpot_s.mean == pytest.approx(0.3 / 4)
    assert summary.itl_s.p50 == pytest.approx(0.15)
    assert summary.e2e_s.p50 == pytest.approx(0.35)
    assert "1 UNAVAILABLE" in str(summary_table(summary).title)


def test_summary_of_failures_alone_has_no_times() -> None:
    summary = summarize([Outcome(0.0, (), "DEADLINE_EXCEEDED")], wall_s=1.0)
    assert summary.ttft_s.mean is None
    assert summary_table(summary).row_count == 4


FAST = Outcome(0.0, ((0.1, 1), (0.2, 4)))  # TTFT 100 ms, TPOT 25 ms
ONE_MESSAGE = Outcome(0.0, ((0.3, 1),))
FAILED = Outcome(0.0, ((0.1, 1), (0.2, 4)), "UNAVAILABLE")
EMPTY = Outcome(0.0, ())


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        ("ttft=0.1", [FAST]),
        ("ttft=0.3", [FAST, ONE_MESSAGE]),
        ("tpot=0.025", [FAST, ONE_MESSAGE]),
        ("tpot=0.02", [ONE_MESSAGE]),
        (" ttft=0.2, tpot=1", [FAST]),
        ("ttft=0.05", []),
    ],
)
def test_goodput_counts_requests_within_all_objectives(slo: str, met: list[Outcome]) -> None:
    outcomes = [FAST, ONE_MESSAGE, FAILED, EMPTY]
    assert [outcome for outcome in outcomes if parse_slo(slo).is_met(outcome)] == met
    summary = summarize(outcomes, 2.0, parse_slo(slo))
    assert (summary.goodput, summary.within_slo) == (len(met) / 2.0, len(met) / 4)


def test_goodput_is_told_with_its_objectives() -> None:
    summary = summarize([FAST, FAILED], 1.0, Slo(0.5, 0.05))
    caption = "goodput 1.00 requests/s: 50.0% are within TTFT 500 ms and TPOT 50 ms"
    assert summary_table(summary).caption == caption
    assert summary_table(summarize([FAST], 1.0)).caption is None


@pytest.mark.parametrize("text", ["", "ttft", "ttft=fast", "ttft=0", "tpot=-1", "ttft=inf", "itl=1", "ttft=1;tpot=1"])
def test_odd_objectives_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape("give seconds, as in ttft=0.5,tpot=0.05")):
        parse_slo(text)
