"""The Ray actors that workers live in: one for each rank, one for each router.

    start --> report: starting, loading n of m ... ready ...        (watch answers whenever the report changes)
                 `--> report: failure, the reason in words          (the supervisor then ends the process)

An actor says what happens to it and decides nothing; the supervisor does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray.util import get_node_ip_address

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.cluster_key import read_cluster_key
from splitserve.cluster.errors import SplitserveError
from splitserve.cluster.log import start_logging
from splitserve.cluster.messages import Member
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_sections import Role
from splitserve.deploy.cluster_state import ClusterFolder
from splitserve.deploy.garbage import spare_what_is_there
from splitserve.models.resolve import resolve_model
from splitserve.router.service import RouterService

POLL_S = 0.1
WATCH_S = 10.0  # bounded, since the watch of a supervisor that died would hold one of the actor's few threads
STOP_S = 3.0
NODE_ADDRESS = "node"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What an actor says of itself. `progress`: tensors loaded and tensors in all.

    `member`: what routers need to know, once a leader is ready. `endpoint`: where a router listens, once it does.
    `members`: the incarnations that a router knows. `failure`: why the worker ended, None while it lives.
    `digest` is that of the spec that it serves by. `draining`: it was told to, and `drained`: holds nothing any more.
    """

    incarnation: str
    digest: str
    node: str
    pid: int
    log: Path
    progress: tuple[int, int] = (0, 0)
    member: Member | None = None
    endpoint: str = ""
    members: tuple[Member, ...] = ()
    draining: bool = False
    drained: bool = False
    failure: str | None = None


def _first_report(cluster: str, name: str, incarnation: str, digest: str) -> Report:
    log = start_logging(ClusterFolder(cluster).logs, name, capture_output=True)
    logger.info("process %d started, incarnation %s", os.getpid(), incarnation)
    return Report(incarnation, digest, ray.get_runtime_context().get_node_id(), os.getpid(), log)


def _describe(error: Exception) -> str:
    """The reason of a failure for people, and in the log with its traceback unless we raised it on purpose."""
    if isinstance(error, SplitserveError):
        logger.error("%s", error)
        return str(error)
    logger.error("unexpected error", exc_info=error)
    return f"{type(error).__name__}: {error}"


class RankActor:
    """Holds one rank's worker, which runs in a thread of its own. Methods are called from several threads."""

    def __init__(self, cluster: str, name: str, incarnation: str, digest: str) -> None:
        self._report = _first_report(cluster, name, incarnation, digest)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)

    def start(self, spec: RankSpec, group_address: str) -> str:
        """Bind the worker's sockets and let it run; returns where its followers connect.

        The device "cuda" and the address "node" in `spec` are made this process's own, and a key on file is read.
        """
        from splitserve.deploy.worker import Worker  # imports torch, which the supervisor must not have to

        try:
            keys = _own_keys(spec.topology, spec.keys)
            own = replace(spec, device=_own_device(spec.device), bind=_own_address(spec.bind), keys=keys)
            self._worker = Worker(replace(own, group_address=group_address))
        except Exception as error:
            self._report = replace(self._report, failure=_describe(error))
            raise
        self._thread.start()
        return self._worker.group_address

    def watch(self, seen: Report | None) -> Report:
        """The report as soon as it is another than `seen`, or after WATCH_S."""
        deadline = time.monotonic() + WATCH_S
        while (report := self._now()) == seen and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return report

    def drain(self, wanted: bool) -> None:
        """Take no reservations while `wanted`; the report says when nothing is left."""
        self._worker.drain.wanted = wanted

    def switch(self, topology: Topology, role: Role, digest: str) -> None:
        """Serve another role with the weights that are loaded, and report by `digest` from now on."""
        self._worker.switch(topology, role)
        self._report = replace(self._report, digest=digest)

    def stop(self) -> None:
        """End the worker in good order: it frees what it holds."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(STOP_S)

    def _now(self) -> Report:
        if self._thread.is_alive():
            worker = self._worker
            told = replace(self._report, draining=worker.drain.wanted, drained=worker.drain.is_done)
            return replace(told, progress=worker.progress, member=worker.member())
        return self._report

    def _run(self) -> None:
        try:
            self._worker.run(self._stop)
            failure = "stopped"
        except Exception as error:
            failure = _describe(error)
        self._report = replace(self._report, failure=failure)


class RouterActor:
    """Holds one router, in the event loop that Ray gives an actor with coroutines for methods."""

    def __init__(self, cluster: str, name: str, incarnation: str, digest: str) -> None:
        self._report = _first_report(cluster, name, incarnation, digest)
        self._changed = asyncio.Event()
        self._service: RouterService | None = None

    async def start(self, topology: Topology, index: int, keys: CurveKeys | None) -> None:
        try:
            model_folder = await asyncio.to_thread(resolve_model, topology.model.path)
            own_keys = _own_keys(topology, keys)
            self._service = RouterService(topology, model_folder, index=index, keys=own_keys)
            endpoint = await self._service.start()
            spare_what_is_there()
            self._say(replace(self._report, endpoint=endpoint))
        except Exception as error:
            self._say(replace(self._report, failure=_describe(error)))

    async def set_members(self, members: tuple[Member, ...]) -> None:
        if self._service is not None:
            self._service.set_members(list(members))
            self._say(replace(self._report, members=members))

    async def drain(self, wanted: bool) -> None:
        """Refuse new requests, for good; the report says when none is left."""
        if self._service is not None and wanted and not self._report.draining:
            self._say(replace(self._report, draining=True))
            await self._service.drain()
            self._say(replace(self._report, drained=True))

    async def watch(self, seen: Report | None) -> Report:
        """The report as soon as it is another than `seen`, or after WATCH_S."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WATCH_S):
                while self._report == seen:
                    await self._changed.wait()
        return self._report

    def _say(self, report: Report) -> None:
        self._report = report
        self._changed.set()
        self._changed = asyncio.Event()

    async def stop(self) -> None:
        if self._service is not None:
            await self._service.stop()


def _own_address(bind: str) -> str:
    """`bind`, or this node's address as Ray's other nodes know it."""
    if bind != NODE_ADDRESS:
        return bind
    address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _own_keys(topology: Topology, made: CurveKeys | None) -> CurveKeys | None:
    """The cluster's keys as this host has them on file, else those `made` for this launch."""
    path = topology.security.cluster_key
    return made if path is None else read_cluster_key(Path(path))


def _own_device(device: str) -> str:
    """ "cpu", or "cuda:N" with N this process's ordinal of the GPU that Ray gave it; all GPUs stay visible."""
    if device == "cpu":
        return device
    (gpu,) = ray.get_runtime_context().get_accelerator_ids()["GPU"]
    return f"cuda:{ordinal(gpu, os.environ.get('CUDA_VISIBLE_DEVICES'))}"


def ordinal(gpu: str, visible: str | None) -> int:
    """This process's number for the host's GPU `gpu`, where CUDA_VISIBLE_DEVICES is `visible`."""
    return visible.split(",").index(gpu) if visible else int(gpu)
