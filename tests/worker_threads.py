"""A whole cluster in this process, a thread a rank: real sockets, collectives, shared memory and gRPC, without Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from splitserve.client import Client
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.topology import Topology
from splitserve.deploy.worker import Worker
from splitserve.models.resolve import resolve_model
from splitserve.router.service import RouterService
from tests.ports import free_port

log = logging.getLogger(__name__)


def topology(
    model: Path,
    *,
    prefill_tp: int = 1,
    decode_tp: int = 1,
    device: str = "cpu",
    dtype: str = "float32",
    **changes: Any,
) -> Topology:
    """A small cluster on a free port; `changes` replace whole sections."""
    pool = {"device": device, "kv_memory": "64MiB", "page_size": 16}
    settings: dict[str, Any] = {
        "name": "threads",
        "model": {"path": str(model), "dtype": dtype, "context": 1024},
        "router": {"grpc": f"127.0.0.1:{free_port()}"},
        "prefill": {**pool, "layout": {"tp": prefill_tp}},
        "decode": {**pool, "layout": {"tp": decode_tp}},
        "kv_transfer": {"staging": "4MiB", "transport": "shm"},  # CUDA IPC needs two processes
    }
    return Topology.model_validate(settings | changes)


@contextlib.contextmanager
def running(described: Topology) -> Iterator[Client]:
    """Start `described`'s workers and its router; yields a client once requests can be placed.

    Each pool's CUDA ranks take the GPUs from the first on, so that pools share them where there are few.
    """
    stop, failures = threading.Event(), list[BaseException]()
    threads: list[threading.Thread] = []
    leaders: list[Worker] = []

    def start(spec: RankSpec) -> Worker:
        def run() -> None:
            try:
                worker.run(stop)
            except BaseException as error:
                log.exception("a worker ends")
                failures.append(error)

        worker = Worker(spec)
        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        return worker

    try:
        for role in described.roles:
            pool = described.pool(role)
            for replica in range(pool.replicas):
                device = _device(pool.device, 0)
                leader = RankSpec(described, role, replica, 0, 0, device, "127.0.0.1", f"{role}-{replica}")
                leaders.append(start(leader))
                for rank in range(1, pool.layout.tp):
                    address = leaders[-1].group_address
                    start(replace(leader, tp_rank=rank, device=_device(pool.device, rank), group_address=address))
                # One after another: what waits for the whole device spoils the graphs that another thread captures.
                while not leaders[-1].member():
                    assert not failures, failures
                    time.sleep(0.02)
        members = [member for leader in leaders if (member := leader.member()) is not None]
        with _router(described, members) as address:
            client = Client(address)
            yield client
            client.close()
    finally:
        stop.set()
        for thread in threads:
            thread.join(10)
    assert not failures, failures


def _device(kind: str, rank: int) -> str:
    return "cpu" if kind == "cpu" else f"cuda:{rank % torch.cuda.device_count()}"


@contextlib.contextmanager
def _router(described: Topology, members: Any) -> Iterator[str]:
    service = RouterService(described, resolve_model(described.model.path))
    service.set_members(members)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    address = asyncio.run_coroutine_threadsafe(service.start(), loop).result(10)
    try:
        while not service.dispatcher.ready:
            time.sleep(0.02)
        yield address
    finally:
        asyncio.run_coroutine_threadsafe(service.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
