"""What a topology comes to for one model: ranks, places, bytes, transports. Pure functions, nothing is started."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

from splitserve.cluster.errors import TopologyError, TopologyErrors
from splitserve.cluster.layout import DTYPE_BYTES, KvLayout
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_file import TopologyFile
from splitserve.cluster.topology_pools import DecodePool, Layout, PrefillPool
from splitserve.cluster.topology_sections import Role
from splitserve.cluster.units import format_bytes
from splitserve.deploy.placement import Placement, Slot
from splitserve.kv_transfer.staging import window_size
from splitserve.models.config import ModelConfig
from splitserve.models.parameters import total_parameters, weight_bytes

# Of a GPU's memory: context, libraries, activations, communication buffers.
GPU_RUNTIME_BYTES = 3 * 2**30


@dataclass(frozen=True)
class RankPlan:
    """One process: its name "pool/replica/rank" and its place."""

    name: str
    slot: Slot


@dataclass(frozen=True)
class EnginePlan:
    """One scheduler and its TP ranks: its id "pool/replica/dp" and its ranks in TP order."""

    id: str
    replica: int
    dp_rank: int
    ranks: tuple[RankPlan, ...]

    @property
    def hosts(self) -> frozenset[int]:
        return frozenset(rank.slot.host for rank in self.ranks)


@dataclass(frozen=True)
class PoolPlan:
    """All engines of one role; `weight_bytes`, `kv_bytes` and `pages` are those of each rank."""

    role: Role
    layout: Layout
    kv_layout: KvLayout
    weight_bytes: int
    kv_bytes: int
    pages: int
    threads: int
    device: str
    engines: tuple[EnginePlan, ...]

    @property
    def ranks(self) -> tuple[RankPlan, ...]:
        return tuple(rank for engine in self.engines for rank in engine.ranks)

    @property
    def kv_tokens(self) -> int:
        """Tokens whose KV one engine holds."""
        return self.pages * self.kv_layout.page_size


@dataclass(frozen=True)
class Link:
    """How KV gets from one prefill engine to one decode engine."""

    prefill: str
    decode: str
    transport: Literal["cuda_ipc", "shm", "nccl", "tcp"]


@dataclass(frozen=True)
class Plan:
    """A whole cluster. `cpus` counts the threads of all ranks and one for each router."""

    topology: Topology
    model: ModelConfig
    parameters: int
    pools: tuple[PoolPlan, ...]
    links: tuple[Link, ...]

    @property
    def cpus(self) -> int:
        return sum(pool.threads * len(pool.ranks) for pool in self.pools) + self.topology.router.replicas

    @property
    def gpus(self) -> int:
        return len({rank.slot for pool in self.pools if pool.device == "cuda" for rank in pool.ranks})

    @property
    def hosts(self) -> int:
        """Hosts that have a rank."""
        return len({rank.slot.host for pool in self.pools for rank in pool.ranks})


def make_plan(file: TopologyFile, model: ModelConfig) -> Plan:
    """Plan the cluster of `file` for `model`. Raises TopologyErrors with every fault found."""
    topology = file.topology
    layouts = (fault for role in topology.roles for fault in _layout_faults(file, model, role))
    _raise_all(chain(_context_faults(file, model), layouts))
    _raise_all(fault for role in topology.roles for fault in _memory_faults(file, model, role))
    placement = Placement(topology.hosts)
    pools = tuple(_plan_pool(file, model, role, placement) for role in topology.roles)
    plan = Plan(topology, model, total_parameters(model), pools, _links(file, pools))
    if plan.hosts > 1 and topology.security.is_loopback:
        expected = f"ranks on {plan.hosts} hosts have to reach each other: expected node, or an address or interface"
        raise TopologyErrors([file.error("security.bind", topology.security.bind, expected)])
    return plan


def _section(role: Role) -> str:
    """The topology's section that describes the pool of `role`."""
    return "prefill" if role == "prefill" else "decode"


def _raise_all(faults: Iterator[TopologyError]) -> None:
    found = list(faults)
    if found:
        raise TopologyErrors(found)


def _context_faults(file: TopologyFile, model: ModelConfig) -> Iterator[TopologyError]:
    context = file.topology.model.context
    if context > model.max_position_embeddings:
        expected = f"this model's positions end at {model.max_position_embeddings}: expected at most that"
        yield file.error("model.context", context, expected)


def _layout_faults(file: TopologyFile, model: ModelConfig, role: Role) -> Iterator[TopologyError]:
    layout, field = file.topology.pool(role).layout, f"{_section(role)}.layout"
    if not _divides(model, layout.tp):
        allowed = [str(tp) for tp in range(1, model.num_heads + 1) if _divides(model, tp)]
        heads = f"{model.num_heads} query heads, {model.num_kv_heads} KV heads and a width of {model.intermediate_size}"
        yield file.error(f"{field}.tp", layout.tp, f"the model's {heads} must divide: expected {', '.join(allowed)}")
    if model.moe is None:
        if layout.ep != 1:
            yield file.error(f"{field}.ep", layout.ep, "expected 1: a dense model has no experts to share out")
    elif layout.ep != layout.ranks:
        yield file.error(f"{field}.ep", layout.ep, f"expected tp x dp, which is {layout.ranks}, for an MoE model")
    elif model.moe.num_experts % layout.ep:
        yield file.error(f"{field}.ep", layout.ep, f"expected a divisor of the {model.moe.num_experts} routed experts")


def _divides(model: ModelConfig, tp: int) -> bool:
    kv_heads = 1 if model.mla else model.num_kv_heads
    kv_fits = kv_heads % tp == 0 or tp % kv_heads == 0
    return model.num_heads % tp == 0 and model.intermediate_size % tp == 0 and kv_fits


def _memory_faults(file: TopologyFile, model: ModelConfig, role: Role) -> Iterator[TopologyError]:
    topology, field = file.topology, f"{_section(role)}.kv_memory"
    pool, context = topology.pool(role), topology.model.context
    kv_layout = model.kv_layout(pool.layout.tp, pool.page_size, topology.model.dtype)
    needed = -(-context // pool.page_size) * kv_layout.bytes_per_page
    if pool.kv_memory < needed:
        expected = f"one sequence of {context} tokens takes {format_bytes(needed)} ({needed} bytes): expected that much"
        yield file.error(field, format_bytes(pool.kv_memory), expected)
    if role == "decode" and topology.prefill is not None:
        least = window_size(kv_layout, 1, topology.prefill.layout.tp, 0)
        if topology.staging < least:
            expected = f"a token of one layer of every prefill rank takes {least} bytes: expected that much"
            yield file.error("kv_transfer.staging", topology.staging, expected)
    if pool.device == "cpu":
        return
    weights, staging = _weight_bytes(topology, model, pool), topology.gpu_staging(role)
    memory = int(topology.hosts.gpu_memory * pool.gpu_fraction)
    left = memory - weights - staging - GPU_RUNTIME_BYTES
    if pool.kv_memory > left:
        taken = ((weights, "weights"), (staging, "staging"), (GPU_RUNTIME_BYTES, "run time"))
        parts = ", ".join(f"{format_bytes(size)} of {what}" for size, what in taken if size)
        room = f"leave {format_bytes(left)} for KV" if left > 0 else "do not fit: share the model over more ranks"
        share = "a GPU" if pool.gpu_fraction == 1 else f"{pool.gpu_fraction:.0%} of a GPU"
        expected = f"on {share} of {format_bytes(memory)}, {parts} {room}"
        yield file.error(field, format_bytes(pool.kv_memory), expected)


def _weight_bytes(topology: Topology, model: ModelConfig, pool: PrefillPool | DecodePool) -> int:
    return weight_bytes(model, pool.layout.tp, pool.layout.ep, DTYPE_BYTES[topology.model.dtype])


def _plan_pool(file: TopologyFile, model: ModelConfig, role: Role, placement: Placement) -> PoolPlan:
    topology = file.topology
    pool = topology.pool(role)
    kv_layout = model.kv_layout(pool.layout.tp, pool.page_size, topology.model.dtype)
    pages = pool.kv_memory // kv_layout.bytes_per_page
    engines = []
    for replica in range(pool.replicas):
        for dp_rank in range(pool.layout.dp):
            slots = placement.place_engine(pool)
            if slots is None:
                raise TopologyErrors([_no_room(file, role)])
            engines.append(_plan_engine(role, replica, dp_rank, slots))
    return PoolPlan(
        role=role,
        layout=pool.layout,
        kv_layout=kv_layout,
        weight_bytes=_weight_bytes(topology, model, pool),
        kv_bytes=pages * kv_layout.bytes_per_page,
        pages=pages,
        threads=pool.threads,
        device=pool.device,
        engines=tuple(engines),
    )


def _plan_engine(role: Role, replica: int, dp_rank: int, slots: list[Slot]) -> EnginePlan:
    first = dp_rank * len(slots)
    ranks = tuple(RankPlan(f"{role}/{replica}/{first + tp_rank}", slot) for tp_rank, slot in enumerate(slots))
    return EnginePlan(f"{role}/{replica}/{dp_rank}", replica, dp_rank, ranks)


def _no_room(file: TopologyFile, role: Role) -> TopologyError:
    """Why the next engine of `role` has no place."""
    topology, hosts = file.topology, file.topology.hosts
    pool = topology.pool(role)
    found = f"{hosts.count} of {hosts.gpus} GPUs"
    if pool.device == "cpu":
        return file.error("hosts.count", hosts.count, "pools of different node_resource need hosts of their own")
    if hosts.gpus and pool.layout.tp > hosts.gpus and pool.layout.tp % hosts.gpus:
        expected = f"expected at most the {hosts.gpus} GPUs of a host, or a multiple of them"
        return file.error(f"{_section(role)}.layout.tp", pool.layout.tp, expected)
    wanted = [topology.pool(each) for each in topology.roles if topology.pool(each).device == "cuda"]
    total = math.ceil(sum(each.replicas * each.layout.ranks * each.gpu_fraction for each in wanted))
    expected = f"the pools need {total} GPUs, those of an engine on one host: add hosts or GPUs, or ask for fewer ranks"
    return file.error("hosts", found, expected)


def _links(file: TopologyFile, pools: tuple[PoolPlan, ...]) -> tuple[Link, ...]:
    """A link for each pair of engines; what one host shares reaches no other."""
    if file.topology.colocated:
        return ()
    prefill, decode = pools
    chosen, topology = file.topology.kv_transfer.transport, file.topology
    if topology.local_transport in ("cuda_ipc", "nccl") and "cpu" in (prefill.device, decode.device):
        expected = "it needs both pools on GPUs: expected auto, shm or tcp"
        raise TopologyErrors([file.error("kv_transfer.transport", chosen, expected)])
    links = []
    for source in prefill.engines:
        for target in decode.engines:
            together = len(source.hosts | target.hosts) == 1
            if chosen in ("cuda_ipc", "shm") and not together:
                expected = f"{source.id} and {target.id} are on different hosts: expected auto, nccl or tcp"
                raise TopologyErrors([file.error("kv_transfer.transport", chosen, expected)])
            links.append(
                Link(source.id, target.id, topology.local_transport if together else topology.remote_transport)
            )
    return tuple(links)
