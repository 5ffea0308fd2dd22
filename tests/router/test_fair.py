"""Who goes first, and that nobody is forgotten."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.cluster.api_key_file import add_api_key
from splitserve.cluster.messages import EngineSpeed
from splitserve.router.fair import Claimant, FairSemaphore
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from tests.router.routers import eventually, nothing_left, running_router


async def order_of(claimants: dict[str, Claimant], capacity: int = 1) -> list[str]:
    """Names in the order in which they are served, when all come at once and find it taken."""
    semaphore, order = FairSemaphore(capacity), list[str]()
    gate = asyncio.Event()

    async def one(name: str, claimant: Claimant) -> None:
        async with semaphore.hold(semaphore.claim(claimant)):
            order.append(name)
            await gate.wait()
            await asyncio.sleep(0)

    tasks = [asyncio.ensure_future(one("holder", Claimant("holder")))]
    await asyncio.sleep(0)
    tasks += [asyncio.ensure_future(one(name, claimant)) for name, claimant in claimants.items()]
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert not semaphore.locked
    return order[1:]


def test_of_one_tenant_first_come_first_served() -> None:
    names = [f"{number}" for number in range(20)]
    assert asyncio.run(order_of({name: Claimant(cost=float(name)) for name in names})) == names


def test_the_smallest_priority_goes_first() -> None:
    claimants = {f"{priority}": Claimant(priority=priority) for priority in (0, 5, -3, 2, -3000)}
    assert asyncio.run(order_of(claimants)) == ["-3000", "-3", "0", "2", "5"]


def test_a_flood_of_one_tenant_delays_another_ones_first_request_by_one() -> None:
    flood = {f"flood {number}": Claimant("flood") for number in range(100)}
    order = asyncio.run(order_of(flood | {f"small {number}": Claimant("small") for number in range(3)}))
    assert [order.index(f"small {number}") for number in range(3)] == [1, 3, 5]


def test_shares_are_of_cost_not_of_requests() -> None:
    large = {f"large {number}": Claimant("large", cost=300) for number in range(30)}
    small = {f"small {number}": Claimant("small", cost=100) for number in range(90)}
    served = Counter(name.split()[0] for name in asyncio.run(order_of(large | small))[:40])
    assert 9 <= served["large"] <= 11
    assert 29 <= served["small"] <= 31


@pytest.mark.parametrize("seed", range(20))
def test_whoever_gives_up_takes_nothing_with_them(seed: int) -> None:
    """Never more than the capacity hold it; the rest is served to the last one, and everything is free in the end."""

    async def scenario() -> None:
        source, semaphore, holding, served = random.Random(seed), FairSemaphore(3), 0, 0

        async def one() -> None:
            nonlocal holding, served
            claim = semaphore.claim(Claimant(f"{source.randrange(4)}", source.randrange(2), source.random()))
            for _ in range(source.randrange(1, 3)):
                async with semaphore.hold(claim):
                    holding += 1
                    assert holding <= 3
                    try:
                        await asyncio.sleep(source.random() / 1000)
                    finally:
                        holding -= 1
            served += 1

        tasks = [asyncio.ensure_future(one()) for _ in range(60)]
        for _ in range(25):
            await asyncio.sleep(source.random() / 1000)
            source.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert served == sum(result is None for result in results) > 30
        assert holding == 0
        assert not semaphore.locked
        assert not semaphore._line

    asyncio.run(scenario())


def test_of_requests_that_wait_for_an_engine_the_urgent_one_is_next() -> None:
    async def scenario() -> None:
        with FakeCluster(behaviour=Behaviour(slots=1, step_s=0.01)) as cluster:
            async with running_router(cluster) as (service, client):
                running = asyncio.ensure_future(client.generate([1, 2, 3], max_tokens=30).result())
                await eventually(lambda: bool(cluster.engines["decode/0/0"].jobs))
                order: list[int] = []

                async def ask(priority: int) -> None:
                    await client.generate([priority + 1], max_tokens=2, priority=priority).result()
                    order.append(priority)

                waiting = []
                for priority in (3, 2, 0, 1):
                    waiting.append(asyncio.ensure_future(ask(priority)))
                    await eventually(lambda: service.dispatcher.admission.queued == len(waiting))
                await asyncio.gather(running, *waiting)
                assert order == [0, 1, 2, 3]

    asyncio.run(scenario())


def test_shares_are_of_tokens_had_not_of_tokens_asked_for(tmp_path: Path) -> None:
    """Alice's answers may have 100 tokens and stop after two; bob asks for two."""
    file = tmp_path / "keys.toml"
    keys = {name: add_api_key(file, name) for name in ("alice", "bob")}

    async def scenario(cluster: FakeCluster) -> None:
        security = {"api_keys": str(file)}
        async with (
            running_router(cluster, connection={"api_key": keys["bob"]}, security=security) as (service, bob),
            AsyncClient(service.address, api_key=keys["alice"]) as alice,
        ):
            order: list[str] = []

            async def ask(name: str) -> None:
                if name == "alice":
                    await alice.generate("abc", max_tokens=100, stop=["b"]).result()
                else:
                    await bob.generate([5, 6, 7], max_tokens=2).result()
                order.append(name)

            for _ in range(60):
                await ask("alice")
            order.clear()
            running = asyncio.ensure_future(bob.generate([1, 2, 3], max_tokens=100).result())
            await eventually(lambda: bool(cluster.engines["decode/0/0"].jobs))
            waiting = []
            for name in ["alice"] * 10 + ["bob"] * 10:
                waiting.append(asyncio.ensure_future(ask(name)))
                await eventually(lambda: service.dispatcher.admission.queued == len(waiting))
            await asyncio.gather(running, *waiting)
            assert 4 <= order[:10].count("alice") <= 6, order

    with FakeCluster(behaviour=Behaviour(slots=1, step_s=0.005)) as cluster, nothing_left(cluster):
        asyncio.run(scenario(cluster))


def test_what_would_come_too_late_is_refused_at_once_with_a_time_to_come_again() -> None:
    """An engine that computes 100 tokens a second has 500 before it."""

    async def scenario() -> None:
        with FakeCluster(behaviour=Behaviour(speed=EngineSpeed(500, token_s=0.01))) as cluster:
            async with running_router(cluster, slo={"ttft_s": 6.2}) as (_, client):
                await client.generate(list(range(1, 41)), max_tokens=2).result()
                with pytest.raises(SplitserveClientError, match="too late") as refused:
                    await client.generate(list(range(1, 201)), max_tokens=2).result()
                assert refused.value.code == "RESOURCE_EXHAUSTED"
                assert refused.value.retry_after_s == pytest.approx(1.0, abs=0.6)
                with pytest.raises(SplitserveClientError, match="too late") as refused:
                    await client.generate([1, 2, 3], max_tokens=2, timeout_s=2.0).result()
                assert refused.value.retry_after_s == pytest.approx(3.0, abs=0.6)

    asyncio.run(scenario())
