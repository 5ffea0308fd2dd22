"""What streams cost a router while nothing happens in them: 10,000 requests of slow engines, over gRPC.

    python -m benchmarks.idle_streams

Each stream has had its first token and waits for the next. Requests of one token are asked before they are there and
while they are; the peer of that figure is the same router without them.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc

from benchmarks.router import cpu_s
from benchmarks.router_cost import router_and_engines
from benchmarks.rows import Figure, Row, write
from splitserve.client import AsyncClient
from splitserve.router.fake_engine import Behaviour
from splitserve.router.v1 import splitserve_pb2 as pb
from splitserve.router.v1.splitserve_pb2_grpc import SplitServeStub

STREAMS, AT_ONCE = 10_000, 500
CHANNELS = 20  # each with a connection of its own, of which a router takes 1024 streams
OWN = (("grpc.use_local_subchannel_pool", 1),)
QUIET_S, ASKED = 20.0, 50
PROMPT = "What does a router do all day long? " * 4


def main() -> None:
    slow = Behaviour(step_s=3600.0, slots=2 * STREAMS)
    settings = {"max_active": 2 * STREAMS, "max_queue": STREAMS, "default_deadline_s": 3600.0}
    with router_and_engines(slow, **settings) as (pid, addresses):
        asyncio.run(measure(pid, addresses["gRPC"]))


async def measure(pid: int, address: str) -> None:
    async with AsyncExitStack() as stack:
        channels = [grpc.aio.insecure_channel(address, options=OWN) for _ in range(CHANNELS)]
        stubs = [SplitServeStub(await stack.enter_async_context(channel)) for channel in channels]
        client = await stack.enter_async_context(AsyncClient(address))
        alone = await ask(client)
        before = resident_kib(pid)
        streams: list[Any] = []
        while len(streams) < STREAMS:
            streams += await asyncio.gather(*(begin(stubs[index % CHANNELS]) for index in range(AT_ONCE)))
        kept = (resident_kib(pid) - before) / STREAMS
        spent = cpu_s(pid)
        await asyncio.sleep(QUIET_S)
        cores = (cpu_s(pid) - spent) / QUIET_S
        beside = await ask(client)
        assert (await client.status()).active_requests >= STREAMS
    case = f"{STREAMS} idle streams"
    write(
        [
            Row("idle_streams", case, "router memory a stream", "KiB", Figure.of([kept]), "none", None, "lower"),
            Row("idle_streams", case, "router CPU", "cores", Figure.of([cores]), "none", None, "lower"),
            Row(
                "idle_streams",
                case,
                "ttft of another",
                "ms",
                Figure.of(beside),
                "without them",
                Figure.of(alone).value,
                "lower",
            ),
        ]
    )


async def begin(stub: Any) -> Any:
    """A stream that has had its first token."""
    sampling = pb.Sampling(max_tokens=64, ignore_eos=True)
    stream = stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling))
    await stream.read()
    return stream


async def ask(client: AsyncClient) -> list[float]:
    """Milliseconds of each of ASKED requests, one after another."""
    times = []
    for _ in range(ASKED):
        sent = time.perf_counter()
        await client.generate(PROMPT, max_tokens=1, ignore_eos=True).result()
        times.append(1e3 * (time.perf_counter() - sent))
    return times


def resident_kib(pid: int) -> float:
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:"))
    return float(line.split()[1])


if __name__ == "__main__":
    main()
