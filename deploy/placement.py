"""Which host and device each rank of a plan gets. Pure bookkeeping: Ray places the real ones."""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.cluster.topology_pools import DecodePool, PrefillPool
from splitserve.cluster.topology_sections import Hosts

ROUNDING = 1e-6


@dataclass(frozen=True)
class Slot:
    """A place for one rank. `device` is "cpu" or "cuda:N" with N the host's own ordinal."""

    host: int
    device: str


@dataclass
class _Host:
    """`free` is what is left of each GPU, 1 for all of it."""

    index: int
    free: list[float]
    cpu_ranks: int = 0
    node_resource: str | None = None
    claimed: bool = False

    def gpus_with(self, share: float) -> list[int]:
        return [gpu for gpu, free in enumerate(self.free) if free > share - ROUNDING]

    def admits(self, node_resource: str | None) -> bool:
        return not self.claimed or self.node_resource == node_resource

    def claim(self, node_resource: str | None) -> None:
        self.claimed, self.node_resource = True, node_resource


class Placement:
    """Hands out places, engine by engine, on the lowest hosts that have them.

    The ranks of an engine share a host. Only an engine with more GPUs than a host has takes whole hosts. Pools of
    different `node_resource` never share a host.
    """

    def __init__(self, hosts: Hosts) -> None:
        self._gpus = hosts.gpus
        self._hosts = [_Host(index, [1.0] * hosts.gpus) for index in range(hosts.count)]

    def place_engine(self, pool: PrefillPool | DecodePool) -> list[Slot] | None:
        """Places for the `tp` ranks of one more engine of `pool`, in rank order; None where there is no room."""
        hosts = [host for host in self._hosts if host.admits(pool.node_resource)]
        chosen = self._choose_gpu_hosts(hosts, pool) if pool.device == "cuda" else _least_loaded(hosts)
        slots: list[Slot] = []
        for host in chosen:
            host.claim(pool.node_resource)
            count = pool.layout.tp // len(chosen)
            if pool.device == "cuda":
                for gpu in host.gpus_with(pool.gpu_fraction)[:count]:
                    host.free[gpu] -= pool.gpu_fraction
                    slots.append(Slot(host.index, f"cuda:{gpu}"))
            else:
                slots += [Slot(host.index, "cpu")] * count
                host.cpu_ranks += count
        return slots or None

    def _choose_gpu_hosts(self, hosts: list[_Host], pool: PrefillPool | DecodePool) -> list[_Host]:
        gpus = pool.layout.tp
        for host in hosts:
            if len(host.gpus_with(pool.gpu_fraction)) >= gpus:
                return [host]
        whole = [host for host in hosts if host.free and len(host.gpus_with(1)) == self._gpus]
        needed = gpus // max(1, self._gpus)
        straddles = self._gpus and gpus > self._gpus and gpus % self._gpus == 0
        return whole[:needed] if straddles and len(whole) >= needed else []


def _least_loaded(hosts: list[_Host]) -> list[_Host]:
    return [min(hosts, key=lambda host: host.cpu_ranks)] if hosts else []
