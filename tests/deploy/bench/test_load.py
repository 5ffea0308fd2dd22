from __future__ import annotations

import itertools
import random
import statistics

import pytest

from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.load import LoadShape, make_requests, parse_lengths, poisson_arrivals


def draws(text: str, count: int = 4000) -> list[int]:
    draw, source = parse_lengths("prompt-tokens", text), random.Random(0)
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
    "text",
    [
        *("", "0", "-3", "many", "inf", "nan", "1e30", "fixed:0", "fixed:1:2", "fixed:inf", "normal:1:2"),
        *("uniform:5:3", "uniform:1", "uniform:a:b", "uniform:1:inf", "uniform:1:1000001", "uniform:nan:nan"),
        *("lognormal:10:-1", "lognormal:10:11", "lognormal:inf:1", "lognormal:10:1e308", "lognormal:10:nan"),
    ],
)
def test_odd_lengths_are_refused(text: str) -> None:
    for option, lengths in (("prompt-tokens", (text, "1")), ("output-tokens", ("1", text))):
        with pytest.raises(InvalidRequest, match=f"{option}: found .*; expected N, fixed:N, uniform:LOW:HIGH"):
            LoadShape(*lengths)


def test_the_longest_of_a_wide_distribution_have_a_bound() -> None:
    assert max(draws("lognormal:1000:10")) == 1_000_000


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
