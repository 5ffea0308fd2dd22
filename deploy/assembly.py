"""What makes a rank a prefill, a decode or a colocated one: its services, and the engine that its leader runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import RankEndpoint
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.segment_files import sweep
from splitserve.cluster.topology_sections import DEFAULT_CHUNK_TOKENS
from splitserve.decode_worker.device_loop import DecodeLoop, slot_layout
from splitserve.decode_worker.engine import DecodeEngine, DecodeLimits
from splitserve.decode_worker.steps import GraphSteps, Steps, StepwiseSteps
from splitserve.deploy.colocated import ColocatedEngine, LocalInlet, LocalOutlet
from splitserve.deploy.loading import LoadedRank
from splitserve.engine.block_manager import BlockManager
from splitserve.engine.device_sampler import DeviceSampler, HostSampler
from splitserve.engine.grammar import Grammars
from splitserve.engine.ranks import Ranks, RankService
from splitserve.engine.runner import ModelRunner
from splitserve.engine.serving import Engine, Send
from splitserve.kv_transfer.by_device import new_host_sender, new_linked_receiver, new_mover, new_segment
from splitserve.kv_transfer.inlet import KvInlet, ReceiveInlet, ReceiveService
from splitserve.kv_transfer.mover import Mover
from splitserve.kv_transfer.outlet import KvOutlet, SendOutlet, SendService
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.segments import Segment, SegmentReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.shm import host_id
from splitserve.kv_transfer.staging import WindowAllocator
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender
from splitserve.kv_transfer.transport import ReceiverTransport
from splitserve.models.grammar import GrammarCompiler
from splitserve.models.resolve import resolve_model
from splitserve.prefill_worker.engine import PrefillEngine, PrefillLimits


@dataclass(frozen=True)
class RankParts:
    """What a rank does besides running batches. `endpoint`: where it takes KV, if it does."""

    services: tuple[RankService, ...]
    endpoint: RankEndpoint | None
    close: Callable[[], None]


@dataclass(frozen=True)
class Leader:
    """What an engine's leader builds its engine from; `endpoints` are those of all ranks, in order."""

    spec: RankSpec
    loaded: LoadedRank
    ranks: Ranks
    endpoints: Sequence[RankEndpoint]
    send: Send

    @property
    def layout(self) -> KvLayout:
        return self.loaded.runner.cache.layout

    @cached_property
    def grammars(self) -> Grammars:
        """For constrained answers; the model's tokenizer is read when the first one comes."""
        path, limits = self.spec.topology.model.path, self.loaded.limits
        return Grammars(lambda: GrammarCompiler(resolve_model(path), limits.vocab_size, limits.eos_token_ids))


def rank_parts(spec: RankSpec, loaded: LoadedRank) -> RankParts:
    """The parts of one rank. Raises StartupError when a socket or staging memory cannot be had."""
    runner = loaded.runner
    if spec.role == "prefill":
        return _prefill_rank(spec, runner)
    services: tuple[RankService, ...] = ()
    if spec.device != "cpu":
        capacities, context = spec.topology.decode.graph_capacities, spec.topology.model.context
        services += (DecodeLoop(runner.model, loaded.config, runner.cache, capacities, context),)
    if spec.role == "colocated":
        return RankParts(services, None, lambda: None)
    return _decode_rank(spec, runner, services)


def build_engine(leader: Leader) -> Engine:
    """The engine of `leader`'s role."""
    pool = leader.spec.topology.pool(leader.spec.role)
    host = leader.ranks.host_pages(leader.layout, leader.spec.topology.kv_transfer.host_tier)
    blocks = BlockManager(leader.loaded.runner.cache.num_pages, pool.page_size, pool.prefix_cache, host)
    lease_s = leader.spec.topology.kv_transfer.lease_s
    if leader.spec.role == "prefill":
        staging = WindowAllocator(leader.spec.topology.fetch_staging)
        fetching = ReceiveInlet(leader.ranks, leader.layout, leader.endpoints, staging, lease_s)
        return _prefill_engine(leader, blocks, SendOutlet(leader.ranks, blocks), fetching if staging.capacity else None)
    if leader.spec.role == "decode":
        staging = WindowAllocator(leader.spec.topology.staging)
        inlet = ReceiveInlet(leader.ranks, leader.layout, leader.endpoints, staging, lease_s)
        lender = SendOutlet(leader.ranks, blocks) if leader.spec.topology.lends else None
        return _decode_engine(leader, blocks, inlet, lender)
    local = LocalInlet(leader.layout, lease_s)
    prefill = _prefill_engine(leader, blocks, LocalOutlet(local))
    return ColocatedEngine(prefill, _decode_engine(leader, blocks, local))


def _prefill_rank(spec: RankSpec, runner: ModelRunner) -> RankParts:
    mover, topology = new_mover(runner.cache), spec.topology
    sending = _sending(spec, runner, mover, topology.kv_transfer.link_memory)
    if not topology.fetch_staging:
        return sending
    return _both(sending, _receiving(spec, mover, topology.fetch_staging, linked=False))


def _decode_rank(spec: RankSpec, runner: ModelRunner, services: tuple[RankService, ...]) -> RankParts:
    mover = new_mover(runner.cache)
    receiving = _receiving(spec, mover, spec.topology.staging, linked=True)
    parts = replace(receiving, services=(*services, *receiving.services))
    return _both(parts, _sending(spec, runner, mover, link_memory=0)) if spec.topology.lends else parts


def _both(one: RankParts, other: RankParts) -> RankParts:
    def close() -> None:
        one.close()
        other.close()

    return RankParts((*one.services, *other.services), one.endpoint or other.endpoint, close)


def _sending(spec: RankSpec, runner: ModelRunner, mover: Mover, link_memory: int) -> RankParts:
    transport = new_host_sender(TcpSender(time.monotonic, spec.keys), torch.device(spec.device), link_memory)
    sender = KvSender(mover, spec.tp_rank, transport, time.monotonic)
    return RankParts((SendService(runner, sender),), None, sender.close)


def _receiving(spec: RankSpec, mover: Mover, staging: int, linked: bool) -> RankParts:
    """What takes KV into `staging` bytes; `linked` where it may come by NCCL."""
    topology, link = spec.topology, ""
    control, segment = TcpReceiver(spec.bind, spec.keys), _segment(spec, staging, linked)
    transport: ReceiverTransport = control
    if segment is not None and linked and topology.remote_transport == "nccl":
        memory, device = topology.kv_transfer.link_memory, torch.device(spec.device)
        transport, link = new_linked_receiver(control, segment, device, memory, spec.bind)
    if segment is not None:
        transport = SegmentReceiver(transport, segment)
    receiver = KvReceiver(mover, spec.tp_rank, staging, transport, time.monotonic)
    name = segment.name if segment else ""
    endpoint = RankEndpoint(control.endpoint, topology.local_transport, host_id(), name, 0, 0, link)
    return RankParts((ReceiveService(receiver),), endpoint, receiver.close)


def _segment(spec: RankSpec, staging: int, linked: bool) -> Segment | None:
    """The staging area of a rank, if senders of its host share one with it, or it is `linked`."""
    topology = spec.topology
    if topology.local_transport == "tcp" or (topology.local_transport == "nccl" and not linked):
        return None
    if topology.local_transport == "shm":
        sweep(topology.name)  # of what an incarnation before this one left when it was killed
    return new_segment(topology.local_transport, topology.name, staging, torch.device(spec.device))


def _prefill_engine(
    leader: Leader, blocks: BlockManager, outlet: KvOutlet, prefixes: KvInlet | None = None
) -> PrefillEngine:
    spec = leader.spec
    pool = spec.topology.pool(spec.role)
    limits = PrefillLimits(pool.chunk_tokens or DEFAULT_CHUNK_TOKENS, pool.max_sequences, leader.loaded.limits)
    vocab_size, device = leader.loaded.config.vocab_size, torch.device(spec.device)
    chooser = HostSampler() if device.type == "cpu" else DeviceSampler(vocab_size, device)
    return PrefillEngine(
        spec.engine,
        spec.incarnation,
        leader.ranks,
        blocks,
        leader.layout,
        outlet,
        chooser,
        limits,
        leader.grammars,
        leader.send,
        prefixes=prefixes,
    )


def _decode_engine(
    leader: Leader, blocks: BlockManager, inlet: KvInlet, lender: SendOutlet | None = None
) -> DecodeEngine:
    spec = leader.spec
    pool = spec.topology.decode
    limits = DecodeLimits(pool.slots, pool.max_sequences, leader.loaded.limits)
    return DecodeEngine(
        spec.engine,
        spec.incarnation,
        leader.ranks,
        _steps(leader),
        blocks,
        leader.layout,
        inlet,
        limits,
        leader.grammars,
        leader.send,
        lender=lender,
    )


def _steps(leader: Leader) -> Steps:
    spec = leader.spec
    if spec.device == "cpu":
        return StepwiseSteps(leader.ranks)
    capacities, page_size = spec.topology.decode.graph_capacities, leader.layout.page_size
    layout = slot_layout(leader.loaded.config, capacities, spec.topology.model.context, page_size)
    return GraphSteps(leader.ranks, layout, capacities, page_size)
