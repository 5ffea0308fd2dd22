"""A router has prefixes sent from the prefill engine that has them to the one that it placed a prompt on."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from splitserve.cluster.messages import EngineSpeed, FetchPrefix
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from tests.router.routers import nothing_left, running_router
from tests.router.test_service import echo

PROMPT = [5 + n % 50 for n in range(100)]
SPEED = EngineSpeed(batch_tokens=64, token_s=0.01)
BUSY = replace(SPEED, pending_tokens=1000)


@pytest.mark.parametrize("fetches", [True, False])
def test_the_holder_is_asked_where_fetching_is_faster(fetches: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        holder = cluster.engines["prefill/1/0"]
        holder._behaviour = Behaviour(speed=BUSY, fetches=fetches)
        async with running_router(cluster) as (service, client):
            monkeypatch.setattr(service.dispatcher.engines.prefixes, "cached_tokens", lambda *_: {"prefill/1/0": 64})
            completion = await client.generate(PROMPT, max_tokens=9, cache_salt="x").result()
            assert completion.samples[0].token_ids == tuple(echo(PROMPT, 9))
            assert completion.summary.prefill_engine == "prefill/0/0"
            assert [(prefix.token_ids, prefix.extra_keys, prefix.ticket.num_tokens) for prefix in holder.lent] == (
                [(PROMPT[:65], ("x",), 64)] if fetches else []
            )
            assert not cluster.engines["prefill/0/0"].lent

    with FakeCluster(2, 1, Behaviour(speed=SPEED, fetches=fetches)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_what_is_asked_for_an_attempt_that_is_over_is_not_passed_on() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            request_id = (await client.generate(PROMPT, max_tokens=9).result()).request_id
            ticket = cluster.engines["prefill/0/0"]._ticket(("x", 1), 64)
            for name in ("nobody", request_id):
                service.dispatcher._on_message("prefill/0/0", FetchPrefix(name, 1, ticket))
            await asyncio.sleep(0.05)
            assert not any(engine.lent for engine in cluster.engines.values())

    with FakeCluster(2, 1) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))
