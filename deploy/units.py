"""The units of a topology: what is placed, lives and dies together. An engine's ranks are one, and so is a router."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_sections import Role


@dataclass(frozen=True)
class RankPlace:
    """One worker of a unit: its name "pool/replica/rank" and its place in the layout."""

    name: str
    replica: int
    dp_rank: int
    tp_rank: int


@dataclass(frozen=True)
class Unit:
    """`name` is an engine id "pool/replica/dp" or "router/index"; `ranks` is empty for a router.

    An engine belongs to `pool`, from which it has its place and its threads, and serves as `role`, mostly the same.
    """

    name: str
    index: int
    ranks: tuple[RankPlace, ...] = ()
    pool: Role | None = None
    role: Role | None = None

    @property
    def is_router(self) -> bool:
        return not self.ranks

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of its processes; the first one leads."""
        return tuple(rank.name for rank in self.ranks) or (self.name,)


def make_units(topology: Topology, roles: Mapping[str, Role] | None = None) -> tuple[Unit, ...]:
    """Every unit of a cluster, engines first. `roles` are those of engines that serve as another than their pool's."""
    engines = [
        _engine(topology, pool, replica, dp_rank, roles or {})
        for pool in topology.roles
        for replica in range(topology.pool(pool).replicas)
        for dp_rank in range(topology.pool(pool).layout.dp)
    ]
    routers = [Unit(f"router/{index}", index) for index in range(topology.router.replicas)]
    return (*engines, *routers)


def spec_digest(topology: Topology, unit: Unit, restarts: int) -> str:
    """Tells whether a unit's processes would be started alike: it covers what they read of what may change in a roll.

    `restarts` counts those that were asked for without a change.
    """
    reads: dict[str, Any] = {"restarts": restarts}
    if unit.role is None or unit.pool is None:
        router = topology.router.model_copy(update={"replicas": 1})
        reads |= {"router": router, "security": topology.security, "timeout": topology.worker_timeout_s}
    else:
        pool = topology.pool(unit.role).model_copy(update={"replicas": 1})
        reads |= {"role": unit.role, "pool": pool, "threads": topology.pool(unit.pool).threads}
        transports = (topology.local_transport, topology.remote_transport) if not topology.colocated else ()
        reads |= {"kv_transfer": topology.kv_transfer, "staging": topology.staging, "transports": transports}
    text = json.dumps(reads, sort_keys=True, default=lambda section: section.model_dump())
    return hashlib.sha256(text.encode()).hexdigest()


def _engine(topology: Topology, pool: Role, replica: int, dp_rank: int, roles: Mapping[str, Role]) -> Unit:
    tp = topology.pool(pool).layout.tp
    ranks = tuple(
        RankPlace(f"{pool}/{replica}/{dp_rank * tp + tp_rank}", replica, dp_rank, tp_rank) for tp_rank in range(tp)
    )
    name = f"{pool}/{replica}/{dp_rank}"
    return Unit(name, replica, ranks, pool, roles.get(name, pool))
