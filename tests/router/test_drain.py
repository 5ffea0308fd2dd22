"""Engines and routers that drain: they get nothing new, and end what they have."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import openai
import pytest
from openai.types import Completion

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from tests.router.routers import MODEL, eventually, nothing_left, running_router
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
            states = {engine.name: engine.state for engine in (await client.status()).engines}
            assert states == dict.fromkeys(states, "ready") | {draining: "draining"}
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
            reading = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=150).result())
            by_http = asyncio.ensure_future(post(service, 150))
            await eventually(lambda: service.dispatcher.admission.active == 2)
            drained = asyncio.ensure_future(service.drain())
            await asyncio.sleep(0.1)
            async with AsyncClient(service.address) as late:
                with pytest.raises(SplitserveClientError) as refused:
                    await late.generate([5, 6, 7], max_tokens=5).result()
                assert refused.value.code == "UNAVAILABLE"
            with pytest.raises(openai.APIConnectionError):
                await post(service, 5)
            assert not drained.done()
            assert (await reading).samples[0].token_ids == tuple(echo([5, 6, 7], 150))
            assert (await by_http).choices[0].finish_reason == "length"
            await asyncio.wait_for(drained, 2.0)

    with FakeCluster(behaviour=SLOW) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


async def post(service: RouterService, tokens: int) -> Completion:
    """A request over HTTP, on a connection of its own."""
    base_url = f"http://{service.http_address}/v1"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        return await client.completions.create(model=MODEL, prompt=[5, 6, 7], max_tokens=tokens)


@pytest.mark.parametrize("patient", [True, False])
def test_clients_of_a_draining_router_go_to_another_one(patient: bool) -> None:
    """New requests at once; the stream that it runs when it ends with that, or is cut short."""

    async def scenario(cluster: FakeCluster) -> None:
        async with AsyncExitStack() as stack:
            one, other = [(await stack.enter_async_context(running_router(cluster)))[0] for _ in range(2)]
            client = await stack.enter_async_context(AsyncClient([one.address, other.address]))
            reading = asyncio.ensure_future(client.generate([5, 6, 7], max_tokens=150).result())
            await eventually(lambda: one.dispatcher.admission.active or other.dispatcher.admission.active)
            busy = one if one.dispatcher.admission.active else other
            draining = asyncio.ensure_future(busy.drain())
            await asyncio.sleep(0.05)
            for _ in range(5):
                await client.generate([5, 6, 7], max_tokens=5).result()
            assert not draining.done()
            if not patient:
                await asyncio.wait_for(busy.stop(), 4.0)
            assert (await reading).samples[0].token_ids == tuple(echo([5, 6, 7], 150))
            await asyncio.wait_for(draining, 2.0)

    with FakeCluster(behaviour=Behaviour(step_s=0.015)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))
