"""What a cluster should be, as its supervisor is told."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.topology import Topology


@dataclass(frozen=True)
class ClusterSpec:
    """`keys` encrypt the sockets between the cluster's processes; None leaves them plain, or they are on file."""

    topology: Topology
    keys: CurveKeys | None
