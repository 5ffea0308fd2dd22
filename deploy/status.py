"""What the supervisor tells of a cluster, for `splitserve status` and the progress of `splitserve up`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UnitState = Literal["down", "failed", "placing", "starting", "loading", "ready"]


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

    `deaths` counts all since the cluster started; `reason` is the last one's. `endpoint`: host:port of a router.
    """

    name: str
    state: UnitState
    workers: tuple[WorkerStatus, ...]
    deaths: int
    reason: str
    endpoint: str

    @property
    def tensors(self) -> tuple[int, int]:
        """Tensors loaded and tensors in all, over its workers."""
        return sum(worker.progress[0] for worker in self.workers), sum(worker.progress[1] for worker in self.workers)


@dataclass(frozen=True)
class ClusterStatus:
    """`kv_path`: how KV gets from prefill to decode."""

    name: str
    kv_path: str
    units: tuple[UnitStatus, ...] = ()

    @property
    def is_ready(self) -> bool:
        return bool(self.units) and all(unit.state == "ready" for unit in self.units)

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(unit.endpoint for unit in self.units if unit.endpoint)

    @property
    def dead(self) -> UnitStatus | None:
        """A unit that died and is not back, if there is one."""
        return next((unit for unit in self.units if unit.reason and unit.state != "ready"), None)
