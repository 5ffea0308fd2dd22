"""A router's channel to a worker: everything arrives, in order, whatever goes on beside it."""

from __future__ import annotations

import asyncio
import time
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest

from splitserve.cluster.channel import BURST, RouterChannel, WorkerChannel
from splitserve.cluster.messages import Cancel, Heartbeat

ADDRESS = "127.0.0.1"


def test_what_is_sent_on_a_closed_channel_goes_nowhere() -> None:
    async def scenario() -> None:
        channel = RouterChannel("tcp://127.0.0.1:9", b"router", print)
        channel.close()
        channel.send(Heartbeat("router"))

    asyncio.run(scenario())


@pytest.mark.parametrize("rounds", [1, 40])
def test_bursts_arrive_while_the_router_sends(rounds: int) -> None:
    """libzmq tells of news once, and a send may take that up: nothing must wait for the next message."""

    async def scenario(worker: WorkerChannel) -> None:
        seen: list[int] = []
        channel = RouterChannel(worker.address, b"router", lambda item: seen.append(item.attempt))
        channel.send(Heartbeat("router"))
        wanted, heard = 0, 1
        async with asyncio.timeout(20):
            await asyncio.to_thread(worker.socket.poll)
            for turn in range(rounds):
                for _ in range(3 * BURST + turn):
                    worker.send(b"router", Cancel("request", wanted))
                    wanted += 1
                while len(seen) < wanted:
                    channel.send(Heartbeat("router"))
                    heard += 1
                    await asyncio.sleep(0)
            assert seen == list(range(wanted))
            while heard:
                heard -= len(list(worker.receive()))
                await asyncio.sleep(0.01)
        channel.close()

    with closing(WorkerChannel(ADDRESS)) as worker:
        asyncio.run(scenario(worker))


def test_a_burst_gives_others_their_turn() -> None:
    async def scenario(worker: WorkerChannel) -> None:
        seen: list[int] = []
        channel = RouterChannel(worker.address, b"router", lambda item: seen.append(item.attempt))
        channel.send(Heartbeat("router"))
        await asyncio.to_thread(worker.socket.poll)
        for number in range(10 * BURST):
            worker.send(b"router", Cancel("request", number))
        time.sleep(0.2)  # noqa: ASYNC251 the loop is to find all of them waiting
        steps = []
        async with asyncio.timeout(20):
            while len(seen) < 10 * BURST:
                steps.append(len(seen))
                await asyncio.sleep(0)
        # One turn by the loop's own news, and one that was asked for.
        assert max(after - before for before, after in pairwise([*steps, len(seen)])) <= 2 * BURST
        channel.close()

    with closing(WorkerChannel(ADDRESS)) as worker:
        asyncio.run(scenario(worker))


def test_a_listener_that_raises_misses_nothing_else() -> None:
    async def scenario(worker: WorkerChannel) -> None:
        faults: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: faults.append(context))
        seen: list[int] = []

        def take(item: Cancel) -> None:
            seen.append(item.attempt)
            if item.attempt % 3 == 0:
                raise RuntimeError("a fault of the listener's")

        channel = RouterChannel(worker.address, b"router", take)
        channel.send(Heartbeat("router"))
        await asyncio.to_thread(worker.socket.poll)
        for number in range(30):
            worker.send(b"router", Cancel("request", number))
        async with asyncio.timeout(5):
            while len(seen) < 30:  # noqa: ASYNC110 nobody tells
                await asyncio.sleep(0.01)
        assert seen == list(range(30))
        assert len(faults) == 10
        channel.close()

    with closing(WorkerChannel(ADDRESS)) as worker:
        asyncio.run(scenario(worker))
