"""What a stream costs a router, ours over HTTP and gRPC and a Rust one over HTTP, and how soon its first byte comes.

    python -m benchmarks.router_cost --peer PATH      of `vllm-router`, from a virtual environment of its own

Engines do no work: ours speak the workers' protocol, those of the peer are an HTTP server. Both send 32 tokens, 8 ms
apart or in a burst. Ours tokenises the prompt of 1 kB and detokenises the answer (SmolLM2's tokenizer), places by KV
and could go on elsewhere; the peer passes bytes on. All share the cores of one machine, a case of each in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Literal

import grpc
import uvloop

from benchmarks.router import child, cpu_s, engines_ready, free_port
from benchmarks.rows import Figure, Row, write
from splitserve.client import AsyncClient
from splitserve.cluster.messages import Member
from splitserve.cluster.topology import Topology
from splitserve.deploy.garbage import spare_what_is_there
from splitserve.models.resolve import resolve_model
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.service import RouterService
from splitserve.router.v1.splitserve_pb2_grpc import SplitServeStub

MODEL = "smollm2-135m-instruct"
PEER = "vllm-router 0.1.17"
TOKENS, PACE_S = 32, 0.008
PROMPT = "What does a router do all day long, and who would miss it if it were gone? " * 14
SECONDS, WARMUP_S, RUNS = 4.0, 1.5, 3
Way = Literal["HTTP", "gRPC", "peer"]
Ask = Callable[[], Awaitable[float]]


@dataclass(frozen=True)
class Load:
    clients: int
    paced: bool

    @property
    def case(self) -> str:
        return f"{self.clients} clients, {TOKENS} tokens {'8 ms apart' if self.paced else 'in a burst'}"


@dataclass(frozen=True)
class Run:
    """`cpu_ms`: of the router, a stream; `first_ms`: medians of the streams."""

    cpu_ms: float
    first_ms: float


LOADS = [Load(64, True), Load(64, False), Load(1, True), Load(1, False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, help="the command vllm-router")
    peer = parser.parse_args().peer
    for load in LOADS:
        runs: dict[Way, list[Run]] = {"HTTP": [], "gRPC": [], "peer": []}
        for _ in range(RUNS):
            for way in runs:
                pace_s = PACE_S if load.paced else 0.0
                ours = router_and_engines(Behaviour(step_s=pace_s))
                with routed_by_peer(peer, pace_s) if way == "peer" else ours as (pid, addresses):
                    runs[way].append(asyncio.run(measure(load, pid, way, addresses)))
        write(rows(load, runs))


def rows(load: Load, runs: dict[Way, list[Run]]) -> list[Row]:
    theirs = runs.pop("peer")
    return [
        Row(
            "router_cost",
            f"{way}, {load.case}",
            metric,
            "ms",
            Figure.of([getattr(run, name) for run in ours]),
            PEER,
            median(getattr(run, name) for run in theirs),
            "lower",
        )
        for way, ours in runs.items()
        for metric, name in (("router CPU a stream", "cpu_ms"), ("first byte p50", "first_ms"))
    ]


async def measure(load: Load, pid: int, way: Way, addresses: dict[Way, str]) -> Run:
    """Keep the clients asking; what counts begins after WARMUP_S and lasts SECONDS."""
    firsts: list[float] = []
    over = asyncio.Event()
    address = addresses[way]

    async def ask_on(ask: Ask) -> None:
        while not over.is_set():
            firsts.append(await ask())

    async def run(asks: Sequence[Ask]) -> Run:
        asking = [asyncio.create_task(ask_on(ask)) for ask in asks]
        await asyncio.sleep(WARMUP_S)
        firsts.clear()
        began = cpu_s(pid)
        await asyncio.sleep(SECONDS)
        count, spent = len(firsts), cpu_s(pid) - began
        over.set()
        await asyncio.gather(*asking)
        return Run(1e3 * spent / count, 1e3 * median(firsts[:count]))

    if way == "gRPC":
        async with AsyncClient(address) as client:
            return await run([lambda: ask_grpc(client)] * load.clients)
    connections = [await asyncio.open_connection(*address.split(":")) for _ in range(load.clients)]
    try:
        return await run([lambda pair=pair: ask_http(*pair) for pair in connections])  # type: ignore[misc]
    finally:
        for _, writer in connections:
            writer.close()


async def ask_grpc(client: AsyncClient) -> float:
    """One stream; seconds to its first message."""
    sent, first, tokens = time.perf_counter(), 0.0, 0
    async for delta in client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True):
        first = first or time.perf_counter() - sent
        tokens += len(delta.token_ids)
    assert tokens == TOKENS
    return first


async def ask_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> float:
    """One stream over a connection that stays; seconds to the first byte of its first event."""
    body = json.dumps(
        {"model": MODEL, "prompt": PROMPT, "max_tokens": TOKENS, "stream": True, "ignore_eos": True, "temperature": 0}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    sent = time.perf_counter()
    writer.write(f"{head}\r\n\r\n".encode() + body)
    status = await reader.readuntil(b"\r\n\r\n")
    assert status.startswith(b"HTTP/1.1 200"), status
    data = await reader.read(1 << 16)
    first = time.perf_counter() - sent
    while not data.endswith(b"0\r\n\r\n"):
        data += await reader.read(1 << 16)
    assert b"[DONE]" in data
    return first


@contextmanager
def router_and_engines(behaviour: Behaviour, **settings: object) -> Iterator[tuple[int, dict[Way, str]]]:
    """Both in processes of their own; `settings` of the topology's router."""
    with child(_run_engines, behaviour) as engines, child(_run_router, engines.recv(), settings) as router:
        yield router.recv()
        router.send("stop")
        engines.send("stop")


@contextmanager
def routed_by_peer(command: Path, pace_s: float) -> Iterator[tuple[int, dict[Way, str]]]:
    port, metrics_port = free_port(), free_port()
    with child(_run_backend, pace_s) as backend:
        arguments = ["--worker-urls", backend.recv(), "--host", "127.0.0.1", "--port", str(port)]
        quiet = ["--policy", "round_robin", "--prometheus-port", str(metrics_port), "--log-level", "error"]
        with subprocess.Popen([command, *arguments, *quiet], stdout=subprocess.DEVNULL) as process:
            try:
                wait_for(port)
                yield process.pid, {"peer": f"127.0.0.1:{port}"}
            finally:
                process.kill()
        backend.send("stop")


def _run_engines(connection: Connection, behaviour: Behaviour) -> None:
    with FakeCluster(2, 2, behaviour) as cluster:
        connection.send(cluster.members)
        connection.recv()


def _run_router(connection: Connection, members: list[Member], settings: dict[str, object]) -> None:
    addresses = {"gRPC": f"127.0.0.1:{free_port()}", "HTTP": f"127.0.0.1:{free_port()}"}
    router = settings | {"grpc": addresses["gRPC"], "http": addresses["HTTP"]}
    topology = Topology.model_validate({"name": "bench", "model": {"path": MODEL}, "router": router})

    async def serve() -> None:
        service = RouterService(topology, resolve_model(MODEL))
        service.set_members(members)
        await service.start()
        async with grpc.aio.insecure_channel(addresses["gRPC"]) as channel:
            await engines_ready(SplitServeStub(channel))
        spare_what_is_there()
        connection.send((os.getpid(), addresses))
        await asyncio.to_thread(connection.recv)
        await service.stop()

    uvloop.run(serve())  # on uvloop and with few collections of garbage, as in a cluster


def _run_backend(connection: Connection, pace_s: float) -> None:
    """An HTTP server that answers health checks, and completions with TOKENS events."""
    asyncio.run(_serve_backend(connection, pace_s))


async def _serve_backend(connection: Connection, pace_s: float) -> None:
    event = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL}
    text = json.dumps(event | {"choices": [{"index": 0, "text": " word", "logprobs": None, "finish_reason": None}]})
    token, end = chunk(f"data: {text}\n\n"), chunk("data: [DONE]\n\n") + b"0\r\n\r\n"
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    plain = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = request.partition(b"content-length: ")[2].partition(b"\r")[0]
                await reader.readexactly(int(length or 0))
                if b"/v1/completions" not in request:
                    writer.write(plain)
                elif pace_s:
                    writer.write(head)
                    for _ in range(TOKENS):
                        writer.write(token)
                        await asyncio.sleep(pace_s)
                    writer.write(end)
                else:
                    writer.write(head + token * TOKENS + end)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    connection.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    await asyncio.to_thread(connection.recv)


def chunk(text: str) -> bytes:
    return f"{len(text):x}\r\n{text}\r\n".encode()


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on port {port}")


if __name__ == "__main__":
    main()
