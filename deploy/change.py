"""Changes of a cluster that runs: checked here, desired of its supervisor, and followed until all is as desired.

Once a change is desired it is carried out, whether or not the command that asked for it waits.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace

from rich.console import Console
from rich.text import Text

from splitserve.cluster.errors import StartupError
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_file import TopologyFile
from splitserve.deploy.cluster_state import ClusterFolder, ClusterState
from splitserve.deploy.plan import Plan, make_plan
from splitserve.deploy.preflight import (
    at_model_path,
    check_host,
    check_resources,
    check_runnable,
    check_security,
    check_weights,
)
from splitserve.deploy.progress import StatusView
from splitserve.deploy.ray_environment import prepare_ray
from splitserve.models.resolve import load_model_config, resolve_model


def prepare(file: TopologyFile) -> Plan:
    """Find the model, convert it if it has to be, and plan the cluster. Raises TopologyErrors or ModelLoadError."""
    model = file.topology.model
    told = Text(f"preparing {model.path}; what needs converting is converted once")
    with Console(stderr=True).status(told), at_model_path(file):
        resolve_model(model.path)
        return make_plan(file, load_model_config(model.path))


def with_absolute_paths(topology: Topology) -> Topology:
    """Workers do not share this process's working folder."""
    model, security = topology.model, topology.security.with_absolute_paths()
    if os.path.exists(model.path):
        model = model.model_copy(update={"path": os.path.abspath(model.path), "name": model.served_name})
    return topology.model_copy(update={"model": model, "security": security})


def is_as(state: ClusterState, topology: Topology) -> bool:
    """Whether the cluster is to be as `topology` says."""
    prepare_ray(ClusterFolder(state.name).token)
    from splitserve.deploy import driver

    with driver.session(state.name, state.address):
        return driver.desired().topology == with_absolute_paths(topology)


def require_same(state: ClusterState, file: TopologyFile) -> None:
    """Raise StartupError where the cluster runs as another topology than `file` says."""
    if not is_as(state, file.topology):
        raise StartupError(
            f"cluster {state.name} is running as {state.topology} described it, and {file.path} says otherwise; "
            f"`splitserve down {state.name}` first"
        )


def roll(state: ClusterState, file: TopologyFile, view: StatusView, deadline_s: float | None) -> None:
    """Make the cluster what `file` says. Raises InvalidRequest for what cannot change while it runs."""
    topology = with_absolute_paths(file.topology)
    changed = replace(state, topology=os.path.abspath(file.path))
    _become(changed, replace(file, topology=topology), view, "apply", topology, deadline_s)


def scale(state: ClusterState, pool: str, replicas: int, view: StatusView, deadline_s: float | None) -> None:
    """Give a pool so many replicas. Raises InvalidRequest, or InsufficientResources where they have no room."""
    prepare_ray(ClusterFolder(state.name).token)
    from splitserve.deploy import driver

    with driver.session(state.name, state.address):
        scaled = driver.desired().scale(pool, replicas, deadline_s).topology
    _become(state, TopologyFile(state.topology, scaled, {}), view, "scale", pool, replicas, deadline_s)


def change(state: ClusterState, view: StatusView, method: str, *arguments: object) -> float:
    """Change what is desired by a method of `Desired`, and wait until it is so; returns the seconds that took."""
    prepare_ray(ClusterFolder(state.name).token)
    from splitserve.deploy import driver

    with driver.session(state.name, state.address):
        began = time.monotonic()
        _follow(view, driver.change(method, *arguments))
        return time.monotonic() - began


def _become(state: ClusterState, file: TopologyFile, view: StatusView, method: str, *arguments: object) -> None:
    """Change the topology to that of `file`, if there is room for it."""
    topology, folder = file.topology, ClusterFolder(state.name)
    plan = prepare(file)
    check_runnable(plan)
    if state.ray is not None:
        check_weights(file)
        check_host(plan)
        check_security(topology.security)
    prepare_ray(folder.token)
    from splitserve.deploy import driver

    with driver.session(state.name, state.address):
        if state.ray is None:
            check_resources(plan, driver.resources())
        generation = driver.change(method, *arguments)
        routers = range(topology.router.replicas)
        folder.write(replace(state, endpoints=tuple(topology.router.grpc_address(index) for index in routers)))
        _follow(view, generation)


def _follow(view: StatusView, generation: int) -> None:
    """Wait until all is as is desired."""
    from splitserve.deploy import driver

    for role in driver.desired().unserved:
        wait = "are refused" if role == "router" else "wait for one until their deadlines"
        print(f"no worker for {role} is left: requests {wait}", file=sys.stderr, flush=True)
    driver.await_change(view, generation)
