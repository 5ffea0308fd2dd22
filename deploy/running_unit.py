"""One unit's actors: placed, started, heard, told, drained and ended. The supervisor's hands."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from splitserve.cluster.messages import Member
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_sections import Role
from splitserve.deploy.actors import STOP_S, RankActor, Report, RouterActor
from splitserve.deploy.cluster_spec import ClusterSpec
from splitserve.deploy.preflight import REMEDY
from splitserve.deploy.reconcile import Deaths, UnitView
from splitserve.deploy.status import UnitState, UnitStatus, WorkerStatus
from splitserve.deploy.units import RankPlace, Unit

# How much of a node's custom resource a worker takes: enough to be placed there, too little to fill it.
SLIVER = 0.001
CALLS_AT_ONCE = 4
HEARD_S = 10.0  # an adopted unit answers within a tick, unless it hangs
PLACE_S = 30.0  # Ray places what has room within a second, and waits without limit for what has none
# Rounds that an idle OpenMP thread spins before it sleeps, some 10 microseconds. By default it spins on and on, which
# takes the cores from other processes: two ranks of 2 threads each on 2 cores then run 10 to 100 times slower.
BRIEF_SPIN = "1000"
# glibc gives large blocks back to the kernel; a prefill step that takes them anew spends a fifth of its time on page
# faults, in some processes and not in others. These keep them.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 * 2**20), "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20)}

Actor = Any  # an ActorHandle; Ray cannot type the methods of ours


class RunningUnit:
    """The living actors of a unit and what they last said. `death` is why one of them is gone.

    `digest` is that of the spec that they serve by; None for an adopted unit, until it says so.
    """

    def __init__(self, unit: Unit, actors: Mapping[str, Actor], started_at: float, digest: str | None) -> None:
        self.unit = unit
        self.started_at = started_at
        self.digest = digest
        self.reports: dict[str, Report] = {}
        self.death: str | None = None
        self._draining: bool | None = False if digest else None
        self._drained_from = 0.0
        self._stops: list[ray.ObjectRef[None]] = []
        self._stopped_at: float | None = None
        self._actors = actors
        self._told: tuple[Member, ...] = ()
        self._telling: ray.ObjectRef[None] | None = None
        self._watches: dict[ray.ObjectRef[Report], str] = {}
        self._places_by = started_at + PLACE_S
        for name in actors:
            self._watch(name, None)

    @property
    def watches(self) -> list[ray.ObjectRef[Report]]:
        """A pending call of each actor, which ends when there is news or the actor dies."""
        return list(self._watches)

    def hear(self, watch: ray.ObjectRef[Report]) -> None:
        """Take in the news of a watch that has ended."""
        name = self._watches.pop(watch)
        try:
            report = ray.get(watch)
        except RayError as error:
            self._die(name, _cause(error, self.reports.get(name)))
            return
        self.reports[name] = report
        self.digest = self.digest or report.digest
        if self._draining is None and name == self.unit.workers[0]:
            self._draining, self._drained_from = report.draining, time.monotonic()
        if report.failure is not None:
            self._die(name, report.failure)
        else:
            self._watch(name, report)

    def note_placement(self, now: float) -> None:
        """Give it up where no node has had room for it for PLACE_S."""
        if self.reports or now < self._places_by:
            return
        group = get_placement_group(self.unit.name)
        if placement_group_table(group)["state"] in ("PENDING", "RESCHEDULING"):
            self._die(self.unit.workers[0], f"no node has room for {_describe(group.bundle_specs)}; {REMEDY}")

    def _watch(self, name: str, seen: Report | None) -> None:
        self._watches[self._actors[name].watch.remote(seen)] = name

    def _die(self, name: str, reason: str) -> None:
        self.death = self.death or f"{name}: {reason}"

    def tell(self, members: tuple[Member, ...]) -> None:
        """Send a router the membership."""
        self._told = members
        self._telling = self._leader.set_members.remote(members)

    def drain(self, wanted: bool) -> None:
        """Have it refuse what is new from now on, or take it again."""
        self._draining, self._drained_from = wanted, time.monotonic()
        self._leader.drain.remote(wanted)

    def switch(self, topology: Topology, role: Role, digest: str) -> None:
        """Have all its ranks serve `role`."""
        self._draining, self.digest = False, digest
        for actor in self._actors.values():
            actor.switch.remote(topology, role, digest)

    def stop(self) -> list[ray.ObjectRef[None]]:
        """Ask every actor that has started to end in good order; the calls end when they have."""
        self._stopped_at = time.monotonic()
        self._stops = [self._actors[name].stop.remote() for name in self.reports]
        return self._stops

    def kill(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    @property
    def _leader(self) -> Actor:
        return self._actors[self.unit.workers[0]]

    @property
    def _leader_report(self) -> Report | None:
        """What the leader last said, unless it said so before a switch."""
        report = self.reports.get(self.unit.workers[0])
        return report if report is not None and report.digest == self.digest else None

    @property
    def _known_members(self) -> tuple[Member, ...] | None:
        """What a router that listens knows, or will once it has heard what it is being told."""
        report = self._leader_report
        if report is None or not report.endpoint:
            return None
        is_telling = self._telling is not None and not ray.wait([self._telling], timeout=0)[0]
        return self._told if is_telling else report.members

    @property
    def role(self) -> Role | None:
        """What the engine serves as; None where that is not known, and for a router."""
        report = self._leader_report
        return report.member.role if report and report.member else None

    @property
    def _has_stopped(self) -> bool:
        if self._stopped_at is None:
            return False
        _, pending = ray.wait(self._stops, num_returns=len(self._stops), timeout=0) if self._stops else ([], [])
        return not pending or time.monotonic() - self._stopped_at > STOP_S + 1

    @property
    def logs(self) -> dict[str, tuple[str, Path]]:
        """For each worker heard of, the node that it is on and its log file there."""
        return {name: (report.node, report.log) for name, report in self.reports.items()}

    def view(self, deaths: Deaths, deadline_s: float | None) -> UnitView:
        """How it is. `deadline_s`: seconds that a drain may take."""
        report, stopping = self._leader_report, self._stopped_at is not None
        late = deadline_s is not None and time.monotonic() - self._drained_from >= deadline_s
        hangs = self._draining is None and time.monotonic() - self.started_at > HEARD_S
        return UnitView(
            running=True,
            death=None if stopping else self.death,
            member=report.member if report else None,
            told=self._known_members,
            deaths=deaths,
            draining=False if hangs else self._draining,
            spent=self._draining is True and (late or bool(report and report.drained)),
            stopping=stopping,
            stopped=self._has_stopped,
        )

    def status(self, deaths: Deaths, membership: tuple[Member, ...], current: bool) -> UnitStatus:
        report = self._leader_report
        workers = tuple(
            WorkerStatus(name, report.node, report.pid, report.progress) for name, report in self.reports.items()
        )
        endpoint = report.endpoint if report else ""
        role, state = self.role or self.unit.role or "router", self._state(membership)
        return UnitStatus(self.unit.name, role, state, workers, deaths.total, deaths.last_reason, endpoint, current)

    def _state(self, membership: tuple[Member, ...]) -> UnitState:
        report = self._leader_report
        if self._draining or self._stopped_at is not None:
            return "draining"
        if report is None:
            return "loading" if self.reports else "placing"
        if report.member is not None or (report.endpoint and report.members == membership):
            return "ready"
        return "loading" if any(report.progress[1] for report in self.reports.values()) else "starting"


def start_unit(spec: ClusterSpec, unit: Unit, digest: str, now: float) -> RunningUnit:
    """Create a unit's actors in its placement group and set them going. Returns before they are placed."""
    incarnation = secrets.token_hex(4)
    group = _placement_group(spec, unit)
    actor_class: Any = ray.remote(RouterActor if unit.is_router else RankActor)
    actors: dict[str, Actor] = {
        name: actor_class.options(
            name=name,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            runtime_env={"env_vars": environment(spec.topology, unit, len(os.sched_getaffinity(0)))},
            **_actor_resources(_resources(spec.topology, unit)),
        ).remote(spec.topology.name, name, incarnation, digest)
        for index, name in enumerate(unit.workers)
    }
    if unit.is_router:
        actors[unit.name].start.remote(spec.topology, unit.index, spec.keys)
    _start_ranks(spec, unit, actors, incarnation)
    return RunningUnit(unit, actors, now, digest)


def _start_ranks(spec: ClusterSpec, unit: Unit, actors: Mapping[str, Actor], incarnation: str) -> None:
    """Followers are handed the leader's answer, its group address, so that they start once it is there."""
    group_address: Any = ""
    for rank in unit.ranks:
        answer = actors[rank.name].start.remote(_rank_spec(spec, unit, rank, incarnation), group_address)
        if rank.tp_rank == 0:
            group_address = answer


def is_tied(topology: Topology, unit: Unit) -> bool:
    """Whether only nodes that carry a custom resource may have it."""
    return bool(_actor_resources(_resources(topology, unit))["resources"])


def find_actors(unit: Unit) -> dict[str, Actor]:
    """The unit's actors that live, by name."""
    return {name: actor for name in unit.workers if (actor := _find_actor(name)) is not None}


def release_placement(unit: str) -> None:
    with contextlib.suppress(ValueError):
        remove_placement_group(get_placement_group(unit))


def _find_actor(name: str) -> Actor | None:
    try:
        return ray.get_actor(name)
    except ValueError:
        return None


def _placement_group(spec: ClusterSpec, unit: Unit) -> PlacementGroup:
    """The unit's own, made when it asks for other places than before: a bundle a worker, on one node if they fit."""
    bundles = [_resources(spec.topology, unit)] * len(unit.workers)
    with contextlib.suppress(ValueError):
        known: PlacementGroup = get_placement_group(unit.name)
        if known.bundle_specs == bundles:
            return known
        remove_placement_group(known)
    group: PlacementGroup = placement_group(bundles, strategy="PACK", name=unit.name, lifetime="detached")
    return group


def _resources(topology: Topology, unit: Unit) -> dict[str, float]:
    """What one worker of the unit takes of a node."""
    if unit.pool is None:
        resources, node_resource = {"CPU": 1.0}, topology.router.node_resource
    else:
        pool = topology.pool(unit.pool)
        resources, node_resource = {"CPU": float(pool.threads)}, pool.node_resource
        if pool.device == "cuda":
            resources["GPU"] = pool.gpu_fraction
    return resources if node_resource is None else resources | {node_resource: SLIVER}


def _actor_resources(resources: Mapping[str, float]) -> dict[str, Any]:
    """The same in the words of actor options."""
    custom = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": resources["CPU"], "num_gpus": resources.get("GPU", 0.0), "resources": custom}


def _describe(bundles: list[dict[str, float]]) -> str:
    """What a placement group asks of one node, or of several."""
    asked = ", ".join(f"{amount:g} {name}" for name, amount in sorted(bundles[0].items()) if amount != SLIVER)
    custom = "".join(f" where there is {name!r}" for name, amount in bundles[0].items() if amount == SLIVER)
    return (f"{len(bundles)} x {asked}" if len(bundles) > 1 else asked) + custom


def environment(topology: Topology, unit: Unit, host_cpus: int) -> dict[str, str]:
    """Environment of a unit's processes: torch reads it when it loads. MKL_CBWR: same bits in any batch."""
    threads = "1" if unit.pool is None else str(topology.pool(unit.pool).threads)
    crowded = _cpu_threads(topology) > host_cpus * topology.hosts.count
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "MKL_CBWR": "AVX2,STRICT",
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **ALLOCATOR,
        **({"GOMP_SPINCOUNT": BRIEF_SPIN} if crowded else {}),
    }


def _cpu_threads(topology: Topology) -> int:
    """Threads that compute on CPUs, and one for each router."""
    pools = [topology.pool(role) for role in topology.roles]
    ranks = sum(pool.threads * pool.replicas * pool.layout.ranks for pool in pools if pool.device == "cpu")
    return ranks + topology.router.replicas


def _rank_spec(spec: ClusterSpec, unit: Unit, rank: RankPlace, incarnation: str) -> RankSpec:
    assert unit.pool is not None
    assert unit.role is not None
    return RankSpec(
        topology=spec.topology,
        role=unit.role,
        replica=rank.replica,
        dp_rank=rank.dp_rank,
        tp_rank=rank.tp_rank,
        device=spec.topology.pool(unit.pool).device,
        bind=spec.topology.security.bind,
        incarnation=incarnation,
        keys=spec.keys,
        home=unit.pool,
    )


def _cause(error: RayError, report: Report | None) -> str:
    """Ray's account of an actor's death, without its page of advice."""
    account = str(error).partition("The actor is dead because ")[2] or str(error)
    if report is not None and "worker process has died" in account:
        return f"process {report.pid} ended without a word: killed, out of memory, or a native crash"
    return account.strip().splitlines()[0]
