"""Keeps a cluster as is desired: starts and ends units, watches them, buries the dead, tells the routers.

It runs as a detached Ray actor, which Ray restarts whenever it dies; then it adopts the actors that still live. All
decisions are `reconcile`'s; this file sees and acts. Commands change what is desired, and nothing else.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from splitserve.cluster.errors import NotFound
from splitserve.cluster.log import merge, start_logging, tail
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_sections import Role
from splitserve.deploy.actors import STOP_S
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.cluster_state import ClusterFolder
from splitserve.deploy.desired import Desired
from splitserve.deploy.memory import Memory
from splitserve.deploy.reconcile import (
    Action,
    Bury,
    Deaths,
    Drain,
    Remove,
    Start,
    Stop,
    Switch,
    Tell,
    UnitView,
    members,
    reconcile,
)
from splitserve.deploy.running_unit import RunningUnit, find_actors, is_tied, release_placement, start_unit
from splitserve.deploy.status import ClusterStatus, UnitState, UnitStatus
from splitserve.deploy.units import Unit, spec_digest

SUPERVISOR = "supervisor"
TICK_S = 0.25
LOG_S = 20.0

logger = logging.getLogger(__name__)


class Supervisor:
    """The actor. Its loop has a thread of its own; methods answer from what the loop last published."""

    def __init__(self, spec: ClusterSpec) -> None:
        self._keys = spec.keys
        self._memory = Memory(spec.topology.name)
        self._desired = self._memory.desired() or Desired(topology=spec.topology)
        self._changing = threading.Lock()
        self._running: dict[str, RunningUnit] = {}
        self._deaths: dict[str, Deaths] = defaultdict(Deaths)
        self._status = ClusterStatus(spec.topology.name, _kv_path(spec.topology))
        self._logs = {SUPERVISOR: (_node(), _start_logging(spec))}
        self._all_heard = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="supervise", daemon=True)
        self._thread.start()

    def status(self) -> ClusterStatus:
        """How the cluster is. A supervisor that has just come hears first how the units are that it found."""
        self._all_heard.wait()
        return self._status

    def desired(self) -> Desired:
        return self._desired

    def change(self, method: str, arguments: tuple[Any, ...]) -> int:
        """Change what is desired by a method of `Desired`; returns the generation that it is from then on."""
        with self._changing:
            changed: Desired = getattr(self._desired, method)(*arguments)
            self._memory.keep_desired(changed)
            logger.info("generation %d, by %s", changed.generation, method)
            self._desired = changed
        return changed.generation

    def logs(self, worker: str | None, count: int) -> list[str]:
        """The last `count` log lines of a worker, or of all by time, from the nodes they run or ran on."""
        known = {name for unit in self._units(self._desired).values() for name in unit.workers} | set(self._logs)
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
            release_placement(running.unit.name)
        self._memory.forget()

    def _supervise(self) -> None:
        try:
            self._adopt()
            while not self._stopping.is_set():
                desired = self._newest_desired()
                for action in reconcile(self._observe(desired), time.monotonic()):
                    self._carry_out(desired, action)
                self._publish(desired)
                self._listen()
                for running in self._running.values():
                    running.note_placement(time.monotonic())
        except Exception:
            logger.exception("the supervisor fails; Ray starts it again")
            os._exit(1)

    def _adopt(self) -> None:
        """Take over whole units that live already, and end what is left of others."""
        for unit in self._memory.started():
            actors = find_actors(unit)
            if len(actors) == len(unit.workers):
                logger.info("adopting %s", unit.name)
                self._running[unit.name] = RunningUnit(unit, actors, time.monotonic(), None)
            else:
                for actor in actors.values():
                    ray.kill(actor)

    def _newest_desired(self) -> Desired:
        """What is to be brought about now. After a change, units that kept dying are tried again at once."""
        desired = self._desired
        if desired.generation != self._status.generation:
            for name, deaths in self._deaths.items():
                self._deaths[name] = replace(deaths, quick=0)
        return desired

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

    def _units(self, desired: Desired) -> dict[str, Unit]:
        """Those that are to run, and those that do."""
        return {unit.name: unit for unit in desired.units} | {
            name: running.unit for name, running in self._running.items()
        }

    def _observe(self, desired: Desired) -> dict[str, UnitView]:
        wanted = {unit.name: unit for unit in desired.units if unit.name not in desired.drained}
        return {name: self._view(desired, name, wanted.get(name)) for name in self._units(desired)}

    def _view(self, desired: Desired, name: str, unit: Unit | None) -> UnitView:
        """`unit` is what is wanted of it, None if it is not to run."""
        deaths, running = self._deaths[name], self._running.get(name)
        if running is None:
            tied = unit is not None and is_tied(desired.topology, unit)
            return UnitView(deaths=deaths, wanted=unit is not None, tied=tied)
        view = running.view(deaths, desired.deadlines.get(name))
        if unit is None or running.digest in (None, _digest(desired, unit)):
            return replace(view, wanted=unit is not None)
        serves = replace(unit, role=running.role)
        if running.role != unit.role and running.digest == _digest(desired, serves):
            return replace(view, new_role=unit.role)
        return replace(view, outdated=True)

    def _carry_out(self, desired: Desired, action: Action) -> None:
        name = action.unit
        match action:
            case Bury(reason=reason):
                self._bury(desired, name, reason)
            case Tell(members=membership):
                self._running[name].tell(membership)
            case Drain(wanted=wanted):
                logger.info("%s %s", name, "drains" if wanted else "takes requests again")
                self._running[name].drain(wanted)
            case Switch(role=role):
                self._switch(desired, name, role)
            case Stop():
                logger.info("ending %s", name)
                self._running[name].stop()
            case Remove():
                self._end(desired, name)
            case Start():
                self._start(desired, name)

    def _end(self, desired: Desired, name: str) -> None:
        """Be done with a unit's processes, and with its place where it shall not come back."""
        self._running.pop(name).kill()
        self._memory.keep_started(running.unit for running in self._running.values())
        if name in desired.drained or name not in self._units(desired):
            release_placement(name)

    def _bury(self, desired: Desired, name: str, reason: str) -> None:
        logger.error("engine or router %s is dead; %s", name, reason)
        running = self._running[name]
        self._end(desired, name)
        self._deaths[name] = self._deaths[name].after(reason, running.started_at, time.monotonic())

    def _switch(self, desired: Desired, name: str, role: Role) -> None:
        logger.info("%s serves as %s from now on", name, role)
        unit = self._units(desired)[name]
        self._running[name].switch(desired.topology, role, _digest(desired, replace(unit, role=role)))

    def _start(self, desired: Desired, name: str) -> None:
        unit = next(unit for unit in desired.units if unit.name == name)
        leftovers = find_actors(unit)
        for actor in leftovers.values():
            ray.kill(actor)
        if not leftovers:  # else Ray still holds the names, and the next tick tries again
            logger.info("starting %s", name)
            spec = ClusterSpec(desired.topology, self._keys)
            self._memory.keep_started((*(running.unit for running in self._running.values()), unit))
            self._running[name] = start_unit(spec, unit, _digest(desired, unit), time.monotonic())

    def _publish(self, desired: Desired) -> None:
        observed = self._observe(desired)
        membership = members(observed)
        units = []
        for name, unit in self._units(desired).items():
            deaths, running, view = self._deaths[name], self._running.get(name), observed[name]
            if running is not None:
                current = view.wanted and not view.outdated and view.new_role is None
                units.append(running.status(deaths, membership, current))
                self._logs = self._logs | running.logs
            else:
                state: UnitState = "failed" if deaths.is_crash_loop else "down"
                state = state if view.wanted else "drained"
                role = unit.role or "router"
                units.append(UnitStatus(name, role, state, (), deaths.total, deaths.last_reason, "", current=True))
        self._status = replace(self._status, generation=desired.generation, units=tuple(units))
        if all(view.draining is not None for view in observed.values()):
            self._all_heard.set()


def _digest(desired: Desired, unit: Unit) -> str:
    return spec_digest(desired.topology, unit, desired.restarts)


def _kv_path(topology: Topology) -> str:
    if topology.colocated:
        return "none: one pool does both"
    local = topology.local_transport
    remote = topology.remote_transport
    return local if topology.hosts.count == 1 or local == remote else f"{local} within a host, {remote} between hosts"


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
