"""A real router over fake engines, for tests."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from splitserve.client import AsyncClient
from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.topology import Topology
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.service import RouterService
from splitserve.router.tokenizer import Tokenizer
from tests.ports import free_port
from tests.router.tiny_tokenizers import write_folder

MODEL = "tiny"
CONTEXT = 256


FOLDER = TemporaryDirectory(prefix="splitserve-test-")  # removed when the process ends


@cache
def model_folder() -> Path:
    """A model folder, the same for all tests of a process."""
    return write_folder(Path(FOLDER.name))


@cache
def tokenizer() -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.load(model_folder())


def topology(
    *,
    colocated: bool = False,
    model: dict[str, Any] | None = None,
    security: dict[str, Any] | None = None,
    tracing: Any = None,
    **router: Any,
) -> Topology:
    """A topology with these settings of the model, of security, of tracing and of the router."""
    return Topology.model_validate(
        {
            "name": "test",
            "model": {"path": "anywhere", "name": MODEL, "context": CONTEXT, **(model or {})},
            "colocated": colocated,
            "security": security or {},
            "tracing": tracing,
            "router": {"grpc": f"127.0.0.1:{free_port()}", "http": f"127.0.0.1:{free_port()}", **router},
        }
    )


@contextlib.asynccontextmanager
async def running_router(
    cluster: FakeCluster, *, keys: CurveKeys | None = None, connection: dict[str, Any] | None = None, **router: Any
) -> AsyncIterator[tuple[RouterService, AsyncClient]]:
    """A started router whose engines are all ready, and a client of it, made with what `connection` says."""
    service = RouterService(topology(**router), model_folder(), keys=keys)
    address = await service.start()
    service.set_members(cluster.members)
    async with AsyncClient(address, **connection or {}) as client:
        await engines_ready(client)
        try:
            yield service, client
        finally:
            engines = list(service.dispatcher.engines)
            await service.stop()
            assert not any(engine.change.lacking for engine in engines), "of requests that are over"


async def engines_ready(client: AsyncClient) -> None:
    """Wait until the router can use all of its engines. Raises AssertionError if it cannot in time."""
    for _ in range(500):
        if all(engine.state == "ready" for engine in (await client.status()).engines):
            return
        await asyncio.sleep(0.01)
    raise AssertionError("some engine never got ready")


async def eventually(condition: Callable[[], object], within_s: float = 2.0) -> None:
    """Wait until `condition` holds. Raises AssertionError if it does not in time."""
    limit = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < limit, "it never came true"
        await asyncio.sleep(0.005)


@contextlib.contextmanager
def nothing_left(cluster: FakeCluster) -> Iterator[None]:
    """Afterwards, within a second, no engine holds a request any more."""
    yield
    limit = time.monotonic() + 1.0
    while held := {name: list(engine.jobs) for name, engine in cluster.engines.items() if engine.jobs}:
        assert time.monotonic() < limit, held
        time.sleep(0.005)
