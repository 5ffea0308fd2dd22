"""Starts and stops whole clusters.

    prepare   the topology's model is found and the plan made
    launch    checks -> a Ray (our own, or the one at an address) -> supervisor -> every unit is ready
    stop      workers, supervisor and our own Ray end; nothing stays behind

A launch that fails, or is interrupted, stops what it has started. Until `keep` is called, a local cluster ends with
this process, however that ends.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass, replace

from rich.console import Console

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.errors import InsufficientResources, StartupError
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_file import TopologyFile
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState
from splitserve.deploy.local_ray import StartedRay, start_local_ray, stop_local_ray
from splitserve.deploy.plan import Plan, make_plan
from splitserve.deploy.preflight import check_host, check_ports, check_resources, check_runnable, check_security
from splitserve.deploy.progress import StatusView
from splitserve.deploy.ray_environment import prepare_ray
from splitserve.models.resolve import load_model_config, resolve_model

NODES_POLL_S = 0.5


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


def prepare(file: TopologyFile) -> Plan:
    """Find the model, convert it if it has to be, and plan the cluster. Raises TopologyErrors or ModelLoadError."""
    path = file.topology.model.path
    with Console(stderr=True).status(f"preparing {path}; what needs converting is converted once"):
        resolve_model(path)
        return make_plan(file, load_model_config(path))


def launch(file: TopologyFile, address: str | None, view: StatusView, wait_s: float = 0.0) -> RunningCluster:
    """Bring a cluster up on the Ray at `address`, or on one of our own; returns once it answers requests.

    Nodes that the Ray at `address` still lacks have `wait_s` to join it.
    A cluster of that name and content that runs already is returned as it is. Raises StartupError when it runs with
    another content, or with the reason why it does not start.
    """
    folder = ClusterFolder(file.topology.name)
    with folder.lock():
        running = folder.live()
        if running is not None and _answers(running):
            _check_same(running, file)
            return RunningCluster(running, None, is_new=False)
        plan = prepare(file)
        check_runnable(plan)
        if address is not None:
            return _launch_on(file, plan, address, None, view, wait_s)
        check_ports(file.topology.router)
        check_security(file.topology.security)
        check_host(plan)
        started = start_local_ray(folder, plan.cpus, plan.gpus)
        try:
            return _launch_on(file, plan, started.address, started, view)
        except BaseException:
            stop_local_ray(folder, started.ray)
            raise


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


def digest(topology: Topology) -> str:
    """Tells whether two topologies say the same."""
    return hashlib.sha256(topology.model_dump_json().encode()).hexdigest()


def _launch_on(
    file: TopologyFile, plan: Plan, address: str, started: StartedRay | None, view: StatusView, wait_s: float = 0.0
) -> RunningCluster:
    topology, folder = file.topology, ClusterFolder(file.topology.name)
    ray = started.ray if started else None
    state = ClusterState(topology.name, address, os.path.abspath(file.path), digest(topology), (), ray)
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
            endpoints = driver.bring_up(ClusterSpec(_with_absolute_paths(topology), keys), view)
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


def _with_absolute_paths(topology: Topology) -> Topology:
    """Workers do not share this process's working folder."""
    model, security = topology.model, topology.security.with_absolute_paths()
    if os.path.exists(model.path):
        model = model.model_copy(update={"path": os.path.abspath(model.path), "name": model.served_name})
    return topology.model_copy(update={"model": model, "security": security})


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


def _check_same(running: ClusterState, file: TopologyFile) -> None:
    if running.digest != digest(file.topology):
        name = running.name
        raise StartupError(
            f"cluster {name} is running as {running.topology} described it, and {file.path} says otherwise; "
            f"`splitserve down {name}` first"
        )
