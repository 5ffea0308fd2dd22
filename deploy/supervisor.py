"""Keeps a cluster as its topology describes it: starts units, watches them, buries the dead, tells the routers.

It runs as a detached Ray actor, which Ray restarts whenever it dies; then it adopts the actors that still live. All
decisions are `reconcile`'s; this file sees and acts.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from splitserve.cluster.errors import NotFound
from splitserve.cluster.log import merge, start_logging, tail
from splitserve.cluster.topology import Topology
from splitserve.deploy.actors import STOP_S
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.cluster_state import ClusterFolder
from splitserve.deploy.reconcile import Action, Bury, Deaths, Start, Tell, UnitView, members, reconcile
from splitserve.deploy.running_unit import RunningUnit, find_actors, release_placement, start_unit
from splitserve.deploy.status import ClusterStatus, UnitState, UnitStatus
from splitserve.deploy.units import make_units

SUPERVISOR = "supervisor"
TICK_S = 0.25
LOG_S = 20.0

logger = logging.getLogger(__name__)


class Supervisor:
    """The actor. Its loop has a thread of its own; methods answer from what the loop last published."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._spec = spec
        self._units = {unit.name: unit for unit in make_units(spec.topology)}
        self._running: dict[str, RunningUnit] = {}
        self._deaths = dict.fromkeys(self._units, Deaths())
        self._status = ClusterStatus(spec.topology.name, _kv_path(spec.topology))
        self._logs = {SUPERVISOR: (_node(), _start_logging(spec))}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervise", daemon=True)
        self._thread.start()

    def status(self) -> ClusterStatus:
        return self._status

    def logs(self, worker: str | None, count: int) -> list[str]:
        """The last `count` log lines of a worker, or of all by time, from the nodes they run or ran on."""
        known = {name for unit in self._units.values() for name in unit.workers} | {SUPERVISOR}
        if worker is not None and worker not in known:
            raise NotFound(f"no worker {worker!r} here; there are {', '.join(sorted(known))}")
        by_node: dict[str, list[Path]] = defaultdict(list)
        for name, (node, path) in self._logs.items():
            if worker in (None, name):
                by_node[node].append(path)
        calls = {node: _read_tails(node, paths, count) for node, paths in by_node.items()}
        return merge([lines for node, call in calls.items() for lines in _answer(node, call)], count)

    def shutdown(self) -> None:
        """End every worker in good order, and those that take too long at once."""
        self._stopping.set()
        self._thread.join()
        stops = [call for running in self._running.values() for call in running.stop()]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=STOP_S + 1)
        for running in self._running.values():
            running.kill()
            release_placement(running.unit)

    def _supervise(self) -> None:
        try:
            self._adopt()
            while not self._stopping.is_set():
                for action in reconcile(self._observe(), time.monotonic()):
                    self._carry_out(action)
                self._publish()
                self._listen()
        except Exception:
            logger.exception("the supervisor fails; Ray starts it again")
            os._exit(1)

    def _adopt(self) -> None:
        """Take over whole units that live already. What is left of others goes when they start."""
        for name, unit in self._units.items():
            actors = find_actors(unit)
            if len(actors) == len(unit.workers):
                logger.info("adopting %s", name)
                self._running[name] = RunningUnit(unit, actors, time.monotonic())

    def _listen(self) -> None:
        """Wait for news, at most a tick."""
        watches = {watch: running for running in self._running.values() for watch in running.watches}
        if not watches:
            self._stopping.wait(TICK_S)
            return
        ray.wait(list(watches), num_returns=1, timeout=TICK_S)
        news, _ = ray.wait(list(watches), num_returns=len(watches), timeout=0)
        for watch in news:
            watches[watch].hear(watch)

    def _observe(self) -> dict[str, UnitView]:
        return {name: self._view(name) for name in self._units}

    def _view(self, name: str) -> UnitView:
        deaths, running = self._deaths[name], self._running.get(name)
        return running.view(deaths) if running else UnitView(deaths=deaths)

    def _carry_out(self, action: Action) -> None:
        match action:
            case Bury(name, reason):
                self._bury(name, reason)
            case Tell(name, membership):
                self._running[name].tell(membership)
            case Start(name):
                self._start(name)

    def _bury(self, name: str, reason: str) -> None:
        logger.error("engine or router %s is dead; %s", name, reason)
        running = self._running.pop(name)
        running.kill()
        self._deaths[name] = self._deaths[name].after(reason, running.started_at, time.monotonic())

    def _start(self, name: str) -> None:
        leftovers = find_actors(self._units[name])
        for actor in leftovers.values():
            ray.kill(actor)
        if not leftovers:  # else Ray still holds the names, and the next tick tries again
            logger.info("starting %s", name)
            self._running[name] = start_unit(self._spec, self._units[name], time.monotonic())

    def _publish(self) -> None:
        membership = members(self._observe().values())
        units = []
        for name in self._units:
            deaths, running = self._deaths[name], self._running.get(name)
            if running is not None:
                units.append(running.status(deaths, membership))
                self._logs = self._logs | running.logs
            else:
                state: UnitState = "failed" if deaths.is_crash_loop else "down"
                units.append(UnitStatus(name, state, (), deaths.total, deaths.last_reason, ""))
        self._status = replace(self._status, units=tuple(units))


def _kv_path(topology: Topology) -> str:
    if topology.colocated:
        return "none: one pool does both"
    local = topology.local_transport
    return local if topology.hosts.count == 1 or local == "tcp" else f"{local} within a host, tcp between hosts"


def _start_logging(spec: ClusterSpec) -> Path:
    return start_logging(ClusterFolder(spec.topology.name).logs, SUPERVISOR, capture_output=True)


def _node() -> str:
    return str(ray.get_runtime_context().get_node_id())


@ray.remote(num_cpus=0, max_retries=0)
def _tails(paths: list[Path], count: int) -> list[list[str]]:
    return [tail(path, count) for path in paths]


def _read_tails(node: str, paths: list[Path], count: int) -> ray.ObjectRef[list[list[str]]]:
    """Read log files on the node where they lie, also after their worker's death."""
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    return _tails.options(scheduling_strategy=strategy).remote(paths, count)


def _answer(node: str, call: ray.ObjectRef[list[list[str]]]) -> list[list[str]]:
    try:
        return ray.get(call, timeout=LOG_S)
    except RayError:
        return [[f"the logs of node {node} cannot be read: it is gone or does not answer"]]
