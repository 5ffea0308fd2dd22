"""What the supervisor tells of a cluster, for `splitserve status` and the progress of `splitserve up`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitserve.cluster.topology_sections import Role

UnitState = Literal["down", "failed", "placing", "starting", "loading", "ready", "draining", "drained"]


@dataclass(frozen=True)
class WorkerStatus:
    """One process. `progress`: tensors loaded and tensors in all; (0, 0) before the first is."""

    name: str
    node: str
    pid: int
    progress: tuple[int, int]


@dataclass(frozen=True)
class UnitStatus:
    """An engine or a router. "down" waits for its next start; "failed" died often and is tried once a minute.

    "draining" ends what it runs, before it leaves, starts anew or switches; "drained" is not to run.
    `deaths` counts all since the cluster started; `reason` is the last one's. `endpoint`: host:port of a router.
    `current`: it serves as is wanted of it, not by an older spec.
    """

    name: str
    role: Role | Literal["router"]
    state: UnitState
    workers: tuple[WorkerStatus, ...]
    deaths: int
    reason: str
    endpoint: str
    current: bool

    @property
    def tensors(self) -> tuple[int, int]:
        """Tensors loaded and tensors in all, over its workers."""
        return sum(worker.progress[0] for worker in self.workers), sum(worker.progress[1] for worker in self.workers)


@dataclass(frozen=True)
class ClusterStatus:
    """`kv_path`: how KV gets from prefill to decode. `generation` counts the changes that the supervisor has seen."""

    name: str
    kv_path: str
    generation: int = -1
    units: tuple[UnitStatus, ...] = ()

    @property
    def is_settled(self) -> bool:
        """Whether all is as is wanted."""
        return bool(self.units) and all(unit.state in ("ready", "drained") and unit.current for unit in self.units)

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(unit.endpoint for unit in self.units if unit.endpoint)

    @property
    def failed(self) -> UnitStatus | None:
        """A unit that keeps dying, if there is one."""
        return next((unit for unit in self.units if unit.state == "failed"), None)

    @property
    def dead(self) -> UnitStatus | None:
        """A unit that died and is not back, if there is one."""
        return next((unit for unit in self.units if unit.reason and unit.state != "ready"), None)
