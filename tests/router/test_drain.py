"""Engines and routers that drain: they get nothing new, and end what they have."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from splitserve.client import SplitserveClientError
from splitserve.router.fake_engine import Behaviour, FakeCluster
from tests.router.routers import eventually, nothing_left, running_router
from tests.router.test_service import echo

SLOW = Behaviour(step_s=0.01)


@pytest.mark.parametrize("draining", ["decode/0/0", "prefill/0/0"])
def test_a_draining_engine_ends_what_it_has_and_gets_no_more(draining: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, policy="round_robin") as (service, client):
            streams = [client.generate([5, 6, 7], max_tokens=60) for _ in range(4)]
            early = [asyncio.ensure_future(stream.result()) for stream in streams]
            await eventually(lambda: all(len(cluster.engines[f"decode/{index}/0"].decoding) == 2 for index in range(2)))
            marked = [replace(member, draining=member.engine == draining) for member in cluster.members]
            service.set_members(marked)
            late = [await client.generate([5, 6, 7], max_tokens=5).result() for _ in range(6)]
            for completion in late:
                assert draining not in (completion.summary.prefill_engine, completion.summary.decode_engine)
            ended = await asyncio.gather(*early)
            assert {completion.samples[0].token_ids for completion in ended} == {tuple(echo([5, 6, 7], 60))}
            assert {completion.summary.decode_engine for completion in ended} == {"decode/0/0", "decode/1/0"}

            service.set_members(cluster.members)  # taken back
            again = [await client.generate([5, 6, 7], max_tokens=5).result() for _ in range(4)]
            assert any(draining in (one.summary.prefill_engine, one.summary.decode_engine) for one in again)

    with FakeCluster(2, 2, SLOW) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_with_all_of_a_pool_draining_requests_wait() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            service.set_members([replace(member, draining=member.role == "decode") for member in cluster.members])
            waiting = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=5).result())
            await asyncio.sleep(0.3)
            assert not waiting.done()
            assert not await client.healthy()
            service.set_members(cluster.members)
            assert (await waiting).samples[0].token_ids == tuple(echo([5, 6, 7], 5))

    with FakeCluster() as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_a_draining_router_ends_its_streams_and_refuses_others() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            reading = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=60).result())
            await eventually(lambda: service.dispatcher.admission.active)
            drained = asyncio.ensure_future(service.drain(True))
            await asyncio.sleep(0.05)
            with pytest.raises(SplitserveClientError, match="this router is being drained") as refused:
                await client.generate([5, 6, 7], max_tokens=5).result()
            assert refused.value.code == "UNAVAILABLE"
            assert not drained.done()
            assert (await reading).samples[0].token_ids == tuple(echo([5, 6, 7], 60))
            await asyncio.wait_for(drained, 1.0)
            await service.drain(False)
            assert (await client.generate([5], max_tokens=5).result()).samples[0].token_ids == tuple(echo([5], 5))

    with FakeCluster(behaviour=SLOW) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))
