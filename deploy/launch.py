"""Starts and stops whole clusters.

    launch    checks -> a Ray (our own, or the one at an address) -> supervisor -> every unit is ready
    stop      workers, supervisor and our own Ray end; nothing stays behind

A launch that fails, or is interrupted, stops what it has started. Until `keep` is called, a local cluster ends with
this process, however that ends.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, replace

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.errors import InsufficientResources, StartupError
from splitserve.cluster.topology_file import TopologyFile
from splitserve.deploy.change import prepare, with_absolute_paths
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState
from splitserve.deploy.local_ray import StartedRay, start_local_ray, stop_local_ray
from splitserve.deploy.plan import Plan
from splitserve.deploy.preflight import (
    check_address,
    check_host,
    check_ports,
    check_resources,
    check_runnable,
    check_security,
    check_weights,
    count_gpus,
)
from splitserve.deploy.progress import StatusView
from splitserve.deploy.ray_environment import prepare_ray

NODES_POLL_S = 0.5
WATCH_S, MISSES = 1.0, 3  # how often `await_end` looks, and how often in a row its Ray does not answer
LOGICAL_CPUS = (
    100_000  # of a Ray of our own: threads share the host's cores as the topology says, also of workers to come
)


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that answers. `started` is None where it was running before, or runs on somebody else's Ray."""

    state: ClusterState
    started: StartedRay | None
    is_new: bool = True

    def keep(self) -> None:
        """Let a local cluster outlive this process."""
        if self.started is not None:
            self.started.keep()


def launch(file: TopologyFile, address: str | None, view: StatusView, wait_s: float = 0.0) -> RunningCluster:
    """Bring a cluster up on the Ray at `address`, or on one of our own; returns once it answers requests.

    Nodes that the Ray at `address` still lacks have `wait_s` to join it.
    A cluster of that name that runs already is returned as it is. Raises StartupError with the reason why it does not
    start.
    """
    folder = ClusterFolder(file.topology.name)
    with folder.lock():
        running = folder.live()
        if running is not None and _answers(running):
            return RunningCluster(running, None, is_new=False)
        plan = prepare(file)
        check_runnable(plan)
        if address is not None:
            return _launch_on(file, plan, address, None, view, wait_s)
        check_ports(file.topology.router)
        check_security(file.topology.security)
        check_weights(file)
        check_host(plan)
        started = start_local_ray(folder, LOGICAL_CPUS, count_gpus() if plan.gpus else 0)
        try:
            return _launch_on(file, plan, started.address, started, view)
        except BaseException:
            stop_local_ray(folder, started.ray)
            raise


def await_end(state: ClusterState) -> None:
    """Return when the cluster has been ended, or its Ray is gone."""
    folder, missed = ClusterFolder(state.name), 0
    while missed < MISSES and folder.live() is not None:
        time.sleep(WATCH_S)
        try:
            check_address(state.address)
            missed = 0
        except StartupError:
            missed += 1


def stop(state: ClusterState) -> None:
    """End a cluster."""
    folder = ClusterFolder(state.name)
    if state.ray is not None:
        stop_local_ray(folder, state.ray)
        return
    prepare_ray(folder.token)
    from splitserve.deploy import driver

    try:
        with driver.session(state.name, state.address):
            driver.shutdown()
    except StartupError as error:
        raise StartupError(f"{error}; if that Ray is gone for good, delete {folder.path}") from error
    folder.forget()


def _launch_on(
    file: TopologyFile, plan: Plan, address: str, started: StartedRay | None, view: StatusView, wait_s: float = 0.0
) -> RunningCluster:
    topology, folder = file.topology, ClusterFolder(file.topology.name)
    ray = started.ray if started else None
    state = ClusterState(topology.name, address, os.path.abspath(file.path), (), ray)
    prepare_ray(folder.token)
    from splitserve.deploy import driver

    security = topology.security
    keys = CurveKeys.generate() if security.encrypted and security.cluster_key is None else None
    with driver.session(topology.name, address):
        if driver.has_supervisor():
            raise StartupError(f"a cluster {topology.name} runs on that Ray already; give this one another name")
        _await_nodes(plan, wait_s)
        folder.write(state)
        try:
            endpoints = driver.bring_up(ClusterSpec(with_absolute_paths(topology), keys), view)
        except BaseException:
            driver.shutdown()
            folder.forget()
            raise
    state = replace(state, endpoints=endpoints)
    folder.write(state)
    return RunningCluster(state, started)


def _await_nodes(plan: Plan, wait_s: float) -> None:
    """Raise InsufficientResources where the joined Ray does not have what the plan needs within `wait_s`."""
    from splitserve.deploy import driver

    deadline, told = time.monotonic() + wait_s, False
    while True:
        try:
            return check_resources(plan, driver.resources())
        except InsufficientResources as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                print(f"waiting for nodes, {wait_s:g} s at most; {error}", file=sys.stderr, flush=True)
                told = True
        time.sleep(NODES_POLL_S)


def _answers(state: ClusterState) -> bool:
    """Whether a cluster on somebody else's Ray is still there; our own Ray's owner has been seen alive."""
    if state.ray is not None:
        return True
    prepare_ray(ClusterFolder(state.name).token)
    from splitserve.deploy import driver

    try:
        with driver.session(state.name, state.address):
            return driver.has_supervisor()
    except StartupError:
        return False
