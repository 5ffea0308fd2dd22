"""What a router knows of the load of its engines between two of their stats, which it counts itself."""

from __future__ import annotations

import asyncio
import random

import pytest

from splitserve.cluster.messages import EngineSpeed
from splitserve.router.engines import LoadChange
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from tests.router.routers import nothing_left, running_router

PROMPT = [5 + n % 50 for n in range(100)]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_given_and_ended_adds_up(seed: int) -> None:
    source, change = random.Random(seed), LoadChange()
    told: dict[tuple[str, int], int] = {}
    attempts = [("request", number) for number in range(8)]
    at_stats = 0, 0
    for _ in range(500):
        attempt = source.choice(attempts)
        match source.randrange(5):
            case 0 | 1:
                change.placed(attempt, tokens := source.randrange(1000))
                told[attempt] = tokens
            case 2:
                change.computed(attempt)
                told |= {attempt: 0} if attempt in told else {}
            case 3:
                change.over(attempt)
                told.pop(attempt, None)
            case 4 if source.random() < 0.1:
                change.heard()
                at_stats = len(told), sum(told.values())
        assert (change.requests + at_stats[0], change.tokens + at_stats[1]) == (len(told), sum(told.values()))
    assert change.lacking == told


@pytest.mark.parametrize("colocated", [False, True])
def test_an_engine_that_has_answered_is_idle_before_it_says_so(
    colocated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts that follow one another go where their beginning is cached; many of them fit between two stats."""

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, colocated=colocated) as (service, client):
            engines = service.dispatcher.engines
            holder = next(engine.member.engine for engine in engines if engine.member.role != "decode")
            monkeypatch.setattr(engines.prefixes, "cached_tokens", lambda *_: {holder: 64})
            for _ in range(12):
                summary = (await client.generate(PROMPT, max_tokens=2).result()).summary
                assert summary.prefill_engine == holder

    speed = EngineSpeed(batch_tokens=64, token_s=0.01, step_s=0.0 if not colocated else 1e-5)
    with FakeCluster(2, 2, Behaviour(speed=speed), colocated=colocated) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_prompts_under_way_count_until_their_first_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once, they go where their beginning is cached only as long as computing all of it elsewhere takes longer."""

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            monkeypatch.setattr(service.dispatcher.engines.prefixes, "cached_tokens", lambda *_: {"prefill/0/0": 64})
            answers = await asyncio.gather(*(client.generate(PROMPT, max_tokens=2).result() for _ in range(9)))
            used = [answer.summary.prefill_engine for answer in answers]
            assert 5 <= used.count("prefill/0/0") <= 7, used  # 36 tokens each there, and 100 elsewhere

    behaviour = Behaviour(speed=EngineSpeed(batch_tokens=64, token_s=0.01), prefill_s=0.2)
    with FakeCluster(2, 2, behaviour) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))
