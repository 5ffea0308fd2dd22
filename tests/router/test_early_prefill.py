"""Prefill is asked together with a decode engine that is known to have room, before that has granted anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from splitserve.client import SplitserveClientError
from splitserve.cluster.messages import Busy, Granted, Prefill, Reserve, SendTo
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from tests.router.routers import eventually, nothing_left, running_router
from tests.router.test_service import echo

PROMPT = [5, 6, 7]


def messages(service: RouterService, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of messages that `service` sends and hears from now on."""
    engines, seen = service.dispatcher.engines, list[str]()
    send, hear = engines.send, engines._on_message

    def note(act: Callable[[str, object], None], name: str, message: object) -> None:
        if isinstance(message, Reserve | Prefill | Granted | SendTo):
            seen.append(type(message).__name__)
        act(name, message)

    monkeypatch.setattr(engines, "send", lambda name, message: note(send, name, message))
    monkeypatch.setattr(engines, "_on_message", lambda name, message: note(hear, name, message))
    return seen


@pytest.mark.parametrize("slots", [1, 0], ids=["room", "none known"])
def test_it_is_asked_at_once_where_decode_has_room(slots: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            seen = messages(service, monkeypatch)
            reading = asyncio.ensure_future(client.generate(PROMPT, max_tokens=9).result())
            await eventually(lambda: "SendTo" in seen or not slots)
            if not slots:
                await asyncio.sleep(0.1)
                assert "Prefill" not in seen
                cluster.behaviour = cluster.engines["decode/0/0"]._behaviour = Behaviour(slots=1)
            await reading
            *_, prefill, granted, send_to = seen
            expected = ["Prefill", "Granted", "SendTo"] if slots else ["Granted", "Prefill", "SendTo"]
            assert [prefill, granted, send_to] == expected

    with FakeCluster(behaviour=Behaviour(slots=slots, grant_s=0.05)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("n", [1, 3])
def test_first_tokens_from_before_the_grant_come_once(n: int) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            completion = await client.generate(PROMPT, max_tokens=9, n=n).result()
            assert [sample.token_ids for sample in completion.samples] == [
                tuple(echo(PROMPT, 9, sample)) for sample in range(n)
            ]

    with FakeCluster(behaviour=Behaviour(grant_s=0.1)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_where_decode_refuses_after_all_prefill_is_told_and_another_pair_answers() -> None:
    async def scenario(cluster: FakeCluster) -> None:
        refusing = cluster.engines["decode/0/0"]

        def refuse(router: bytes, message: Reserve) -> None:
            busy = Busy(message.request_id, message.attempt, 0.02)
            cluster.after(0.05, lambda: refusing.channel.send(router, busy))

        refusing._reserve = refuse  # type: ignore[method-assign]
        async with running_router(cluster, policy="round_robin") as (service, client):
            for _ in range(4):
                completion = await client.generate(PROMPT, max_tokens=9, n=2).result()
                found = [sample.token_ids for sample in completion.samples]
                assert found == [tuple(echo(PROMPT, 9, sample)) for sample in range(2)]
                assert completion.summary.decode_engine == "decode/1/0"
                trace = service.dispatcher.recent.chrome_trace(completion.request_id)
                assert "decode/1/0" in trace
                assert "decode/0/0" not in trace
        assert cluster.engines["prefill/0/0"].cancels

    with FakeCluster(1, 2) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"])
def test_where_prefill_fails_before_the_grant_the_reservation_is_given_back(code: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (_, client):
            reading = asyncio.ensure_future(client.generate(PROMPT, max_tokens=9, timeout_s=10).result())
            if code == "INVALID_ARGUMENT":
                with pytest.raises(SplitserveClientError, match="not so"):
                    await reading
            else:
                await asyncio.sleep(0.3)
                cluster.engines["prefill/0/0"]._behaviour = Behaviour()
                completion = await reading
                assert completion.samples[0].token_ids == tuple(echo(PROMPT, 9))

    behaviour = Behaviour(grant_s=0.1, fail_prefill=(code, "not so"))
    with FakeCluster(behaviour=behaviour) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


@pytest.mark.parametrize("engine", ["prefill/0/0", "decode/0/0"])
def test_an_engine_that_dies_before_the_grant_is_no_loss(engine: str) -> None:
    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            reading = [asyncio.ensure_future(client.generate(PROMPT, max_tokens=9, n=2).result()) for _ in range(4)]
            await eventually(lambda: len(cluster.engines[engine].jobs) >= 2)
            cluster.kill(engine)
            service.set_members(cluster.members)
            for completion in await asyncio.gather(*reading):
                found = [sample.token_ids for sample in completion.samples]
                assert found == [tuple(echo(PROMPT, 9, sample)) for sample in range(2)]
                assert completion.summary.losses == 0

    with FakeCluster(2, 2, Behaviour(grant_s=0.2)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))
