from __future__ import annotations

import itertools
import random
import statistics

import pytest

from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.load import LoadShape, make_requests, parse_lengths, poisson_arrivals
from splitserve.deploy.bench.measure import Outcome
from splitserve.deploy.bench.summary import percentile, summarize, summary_table


def draws(text: str, count: int = 4000) -> list[int]:
    draw, source = parse_lengths(text), random.Random(0)
    return [draw(source) for _ in range(count)]


def test_lengths_follow_their_distribution() -> None:
    assert set(draws("128")) == {128}
    assert set(draws("fixed:7")) == {7}
    uniform = draws("uniform:3:5")
    assert set(uniform) == {3, 4, 5}
    lognormal = draws("lognormal:100:0.5")
    assert statistics.median(lognormal) == pytest.approx(100, rel=0.05)
    assert max(lognormal) > 300
    assert min(draws("lognormal:1:3")) == 1


@pytest.mark.parametrize(
    "text", ["", "0", "-3", "many", "fixed:0", "fixed:1:2", "uniform:5:3", "uniform:1", "normal:1:2", "lognormal:10:-1"]
)
def test_odd_lengths_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="lengths: found"):
        parse_lengths(text)


@pytest.mark.parametrize("seed", range(20))
def test_requests_are_a_function_of_the_seed(seed: int) -> None:
    shape = LoadShape("uniform:1:50", "lognormal:20:0.4", prefix_share=0.5)
    requests = make_requests(shape, 1000, 30, seed)
    assert requests == make_requests(shape, 1000, 30, seed)
    assert requests != make_requests(shape, 1000, 30, seed + 1)
    assert all(1 <= len(request.prompt) <= 50 and request.max_tokens >= 1 for request in requests)
    assert all(0 <= token < 1000 for request in requests for token in request.prompt)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_prompts_share_exactly_their_prefix(share: float) -> None:
    requests = make_requests(LoadShape("200", "1", prefix_share=share), 50_000, 10, 3)
    shared = round(200 * share)
    for one, other in itertools.combinations(requests, 2):
        equal = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.prompt, other.prompt, strict=True))
        )
        assert shared <= equal <= shared + 2


def test_prefix_share_is_checked() -> None:
    with pytest.raises(InvalidRequest, match="prefix-share"):
        LoadShape("1", "1", prefix_share=1.5)


def test_poisson_arrivals_have_their_rate() -> None:
    times = list(itertools.islice(poisson_arrivals(50.0, 1), 20_000))
    gaps = [later - earlier for earlier, later in itertools.pairwise([0.0, *times])]
    assert statistics.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert times[:5] == list(itertools.islice(poisson_arrivals(50.0, 1), 5))


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
