"""How many tokens a second a router streams on one core, and how much latency it adds.

Three processes: the router, pinned to one core; fake engines, which log when they send each token; and this one, whose
clients log when they have it. The last two share the other cores. Latency is from the one log to the other, so it
holds two Python processes besides the router. Run: python -m benchmarks.router
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import grpc
import uvloop
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.rows import Figure, Row, write
from splitserve.cluster.messages import Member, SampleToken
from splitserve.cluster.topology import Topology
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from splitserve.router.v1 import splitserve_pb2 as pb
from splitserve.router.v1.splitserve_pb2_grpc import SplitServeStub

ENGINES = 4  # of each pool
STEP_S = 0.02  # between the tokens of one stream
SECONDS, RUNS = 8.0, 3
PROMPT = "What does a router do all day long? " * 8

Log = dict[str, list[float]]  # by request, when each token was sent or received, in seconds of the monotonic clock


@dataclass(frozen=True)
class Window:
    """The part of a run in which all streams are up, and what the router's process used in it."""

    start: float
    end: float
    router_cpu_s: float


@dataclass(frozen=True)
class Run:
    """One run's figures: tokens per second, added latency in ms, cores of the router, tokens in a message."""

    throughput: float
    latency_p50: float
    latency_p99: float
    cores: float
    coalesced: float


def measure(load: int, seconds: float) -> Run:
    """Offer `load` tokens per second for `seconds`."""
    streams = round(load * STEP_S)
    with child(_run_engines) as engines, child(_run_router, engines.recv()) as router:
        address, pid = router.recv()
        received, messages, window = asyncio.run(_stream(address, pid, streams, seconds))
        router.send("stop")
        engines.send("stop")
        sent: Log = engines.recv()
    latencies_ms = [
        1000 * (got - given)
        for request, times in received.items()
        for given, got in zip(sent[request], times, strict=True)
        if window.start < got < window.end
    ]
    percentiles = statistics.quantiles(latencies_ms, n=100)
    length_s = window.end - window.start
    tokens = sum(map(len, received.values()))
    cores = window.router_cpu_s / length_s
    return Run(len(latencies_ms) / length_s, percentiles[49], percentiles[98], cores, tokens / messages)


def rows(load: int, runs: Sequence[Run]) -> list[Row]:
    """What the runs at one load say; the bars are 20,000 tokens/s, and a median of 5 ms at half of that."""
    case = f"{load} tokens/s offered, one core"

    def row(metric: str, unit: str, better: Literal["lower", "higher"], name: str, bar: float | None = None) -> Row:
        figure = Figure.of([getattr(run, name) for run in runs])
        return Row("router", case, metric, unit, figure, "bar" if bar else "none", bar, better)

    return [
        row("throughput", "tokens/s", "higher", "throughput", 0.98 * load),
        row("added latency p50", "ms", "lower", "latency_p50", 5.0 if load == 10_000 else None),
        row("added latency p99", "ms", "lower", "latency_p99"),
        row("router CPU", "cores", "lower", "cores"),
        row("tokens per message", "1", "lower", "coalesced"),
    ]


async def _stream(address: str, router_pid: int, streams: int, seconds: float) -> tuple[Log, int, Window]:
    """Read `streams` streams at once: when each token came, the number of messages, and the window that counts."""
    received: Log = defaultdict(list)
    messages = 0
    sampling = pb.Sampling(max_tokens=round(seconds / STEP_S))

    async def one(stub: Any, delay_s: float) -> None:
        nonlocal messages
        await asyncio.sleep(delay_s)
        async for response in stub.Generate(pb.GenerateRequest(text=PROMPT, sampling=sampling)):
            now = time.monotonic()
            messages += 1
            for delta in response.deltas:
                received[response.request_id] += [now] * len(delta.token_ids)

    async def watch() -> Window:
        await asyncio.sleep(seconds * 0.3)
        start, spent_s = time.monotonic(), cpu_s(router_pid)
        await asyncio.sleep(seconds * 0.6)
        return Window(start, time.monotonic(), cpu_s(router_pid) - spent_s)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = SplitServeStub(channel)
        await engines_ready(stub)
        delays = (stream * seconds * 0.2 / streams for stream in range(streams))
        window = asyncio.create_task(watch())
        await asyncio.gather(*(one(stub, delay_s) for delay_s in delays))
        return received, messages, await window


async def engines_ready(stub: Any) -> None:
    for _ in range(500):
        status = await stub.Status(pb.StatusRequest())
        if all(engine.state == pb.ENGINE_STATE_READY for engine in status.engines):
            return
        await asyncio.sleep(0.01)
    raise TimeoutError("the fake engines never got ready")


@contextmanager
def child(run: Any, *arguments: Any) -> Iterator[Connection]:
    """A process that runs `run(connection, *arguments)`, and our end of the connection."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run, args=(theirs, *arguments))
    process.start()
    try:
        yield ours
        process.join(10.0)
    finally:
        process.kill()


def _run_engines(connection: Connection) -> None:
    sent: Log = defaultdict(list)

    def log(tokens: Sequence[SampleToken]) -> None:
        now = time.monotonic()
        for token in tokens:
            sent[token.request_id].append(now)

    _leave_first_core()
    with FakeCluster(ENGINES, ENGINES, Behaviour(step_s=STEP_S), on_step=log) as cluster:
        connection.send(cluster.members)
        connection.recv()
    connection.send(dict(sent))


def _run_router(connection: Connection, members: list[Member]) -> None:
    async def serve() -> None:
        with tempfile.TemporaryDirectory() as folder:
            _byte_tokenizer().save(f"{folder}/tokenizer.json")
            service = RouterService(_topology(), Path(folder))
        service.set_members(members)
        connection.send((await service.start(), os.getpid()))
        await asyncio.to_thread(connection.recv)
        await service.stop()

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    uvloop.run(serve())  # as Ray runs routers


def _leave_first_core() -> None:
    """The first core is the router's alone, if there are others."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores - {min(cores)} or cores)


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _topology() -> Topology:
    router = {"grpc": f"127.0.0.1:{free_port()}", "max_queue": 10_000, "max_active": 10_000}
    return Topology.model_validate({"name": "bench", "model": {"path": "bytes", "context": 100_000}, "router": router})


def _byte_tokenizer() -> Tokenizer:
    """One token per byte: a token costs the detokeniser the same whatever the vocabulary."""
    vocab = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Write rows for half the bar's load and for the bar's."""
    _leave_first_core()
    for load in (10_000, 20_000):
        write(rows(load, [measure(load, SECONDS) for _ in range(RUNS)]))


if __name__ == "__main__":
    main()
