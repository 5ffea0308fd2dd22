"""The units of a topology: what is placed, lives and dies together. An engine's ranks are one, and so is a router."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_sections import Role


@dataclass(frozen=True)
class RankPlace:
    """One worker of a unit: its name "pool/replica/rank" and its place in the layout."""

    name: str
    role: Role
    replica: int
    dp_rank: int
    tp_rank: int


@dataclass(frozen=True)
class Unit:
    """`name` is an engine id "pool/replica/dp" or "router/index"; `ranks` is empty for a router."""

    name: str
    index: int
    ranks: tuple[RankPlace, ...]

    @property
    def is_router(self) -> bool:
        return not self.ranks

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of its processes; the first one leads."""
        return tuple(rank.name for rank in self.ranks) or (self.name,)


def make_units(topology: Topology) -> tuple[Unit, ...]:
    """Every unit of a cluster, engines first."""
    engines = [
        _engine(topology, role, replica, dp_rank)
        for role in topology.roles
        for replica in range(topology.pool(role).replicas)
        for dp_rank in range(topology.pool(role).layout.dp)
    ]
    routers = [Unit(f"router/{index}", index, ()) for index in range(topology.router.replicas)]
    return (*engines, *routers)


def _engine(topology: Topology, role: Role, replica: int, dp_rank: int) -> Unit:
    tp = topology.pool(role).layout.tp
    ranks = tuple(
        RankPlace(f"{role}/{replica}/{dp_rank * tp + tp_rank}", role, replica, dp_rank, tp_rank)
        for tp_rank in range(tp)
    )
    return Unit(f"{role}/{replica}/{dp_rank}", replica, ranks)
