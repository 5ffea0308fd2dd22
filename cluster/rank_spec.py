"""All that one rank's process is told when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.topology import Topology

Role = Literal["prefill", "decode", "colocated"]


@dataclass(frozen=True)
class RankSpec:
    """One rank of one engine.

    `incarnation` is fresh for every start of the engine; all ranks of an engine share it. `group_address` is where
    the engine's leader (tp_rank 0) takes its followers; empty for the leader itself. `device` is "cpu" or "cuda:N".
    `home` is the pool that its engine is named after, where it was switched to the role of another.
    """

    topology: Topology
    role: Role
    replica: int
    dp_rank: int
    tp_rank: int
    device: str
    bind: str
    incarnation: str
    keys: CurveKeys | None = None
    group_address: str = ""
    home: Role | None = None

    @property
    def tp(self) -> int:
        return self.topology.pool(self.role).layout.tp

    @property
    def engine(self) -> str:
        return f"{self.home or self.role}/{self.replica}/{self.dp_rank}"

    @property
    def name(self) -> str:
        return f"{self.home or self.role}/{self.replica}/{self.dp_rank * self.tp + self.tp_rank}"

    @property
    def is_leader(self) -> bool:
        return self.tp_rank == 0
