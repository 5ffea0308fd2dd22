"""Two small engines in one process: their ranks, caches and a dense truth to compare with. For the tests here."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff, RankEndpoint, Ticket
from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.kv_pack import KvRegion
from splitserve.kv_transfer.memory import Faults, MemoryNetwork, MemoryReceiver, MemorySender
from splitserve.kv_transfer.mover import HostMover, Mark, Move, Moved
from splitserve.kv_transfer.protocol import Incoming, ReceiverEvent, SenderEvent
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.staging import EpochSource, Window

CPU = torch.device("cpu")
POISON = -7.0
HAND_OFF = HandOff((11, 12))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def layout(tp: int = 1, *, heads: int = 4, planes: Literal[1, 2] = 2, page_size: int = 4, layers: int = 3) -> KvLayout:
    return KvLayout(
        tp=tp,
        num_layers=layers,
        planes=planes,
        num_kv_heads=heads,
        head_dim=4,
        page_size=page_size,
        dtype="float32",
    )


def poisoned_cache(of: KvLayout, num_pages: int, device: torch.device = CPU) -> KvCache:
    cache = KvCache(of, num_pages, device)
    for layer in cache.layers:
        layer.fill_(POISON)
    return cache


def dense_kv(of: KvLayout, num_tokens: int, seed: int = 0) -> torch.Tensor:
    """What every layout of the model holds: [layers, planes, all heads, tokens, head_dim]."""
    heads = 1 if of.is_latent else of.num_kv_heads
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(of.num_layers, of.planes, heads, num_tokens, of.head_dim, generator=generator)


def write(cache: KvCache, rank: int, pages: Sequence[int], dense: torch.Tensor, tokens: range) -> None:
    heads = cache.layout.heads(rank)
    for layer, values in zip(cache.layers, dense, strict=True):
        for token in tokens:
            page, slot = pages[token // cache.layout.page_size], token % cache.layout.page_size
            layer[:, page, :, slot] = values[:, heads.start : heads.stop, token]


def expected_cache(
    of: KvLayout, rank: int, num_pages: int, pages: Sequence[int], dense: torch.Tensor, tokens: range
) -> KvCache:
    cache = poisoned_cache(of, num_pages)
    write(cache, rank, pages, dense, tokens)
    return cache


def assert_same(found: KvCache, expected: KvCache) -> None:
    for layer, (left, right) in enumerate(zip(found.layers, expected.layers, strict=True)):
        assert torch.equal(left.cpu(), right.cpu()), f"layer {layer} differs"


class SlowDevice:
    """Where copies take a while, one after the other, as on a GPU's stream: they happen when `tick` finds them due."""

    def __init__(self, clock: Callable[[], float], longest_s: float, seed: int) -> None:
        self.clock = clock
        self._longest_s, self._random = longest_s, random.Random(seed)
        self._under_way: list[SlowMove] = []

    @property
    def busy(self) -> int:
        """Copies under way."""
        return len(self._under_way)

    def start(self, copy: Callable[[], Moved]) -> Move:
        if not self._longest_s:
            return copy()
        move = SlowMove(self, copy, self.due())
        self._under_way.append(move)
        return move

    def due(self) -> float:
        return self.clock() + self._random.uniform(0, self._longest_s)

    def tick(self) -> None:
        while self._under_way and self._under_way[0].due <= self.clock():
            self.run_next()

    def run_next(self) -> None:
        move = self._under_way.pop(0)
        move.done = move.copy()


@dataclass(eq=False)
class SlowMove:
    device: SlowDevice
    copy: Callable[[], Moved]
    due: float
    done: Moved | None = None

    def total(self) -> int | None:
        return None if self.done is None else self.done.total()

    def settle(self) -> None:
        while self.done is None:
            self.device.run_next()


class SlowMover(HostMover):
    """Copies as `HostMover` does, but on a `SlowDevice`, which also takes a while to come past marks."""

    def __init__(self, cache: KvCache, device: SlowDevice) -> None:
        super().__init__(cache)
        self._device = device

    def mark(self) -> Mark:  # type: ignore[override]
        return cast(Mark, self._device.due())

    def passed(self, mark: Mark) -> bool:
        return mark is None or cast(float, mark) <= self._device.clock()

    def pack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor) -> Move:  # type: ignore[override]
        return self._device.start(lambda: HostMover.pack(self, table, region, payload))

    def unpack(self, table: torch.Tensor, region: KvRegion, payload: torch.Tensor, after: Mark) -> Move:  # type: ignore[override]
        return self._device.start(lambda: HostMover.unpack(self, table, region, payload, None))


@dataclass
class Pair:
    """A prefill and a decode engine over a memory network."""

    source: KvLayout
    target: KvLayout
    num_pages: int = 16
    staging_bytes: int = 1 << 16
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    shared_staging: bool = False
    lease_s: float = 8.0
    copies_take_s: float = 0.0

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.network = MemoryNetwork(self.clock, self.seed, self.faults)
        self.epochs = EpochSource()
        self.source_caches = [poisoned_cache(self.source, self.num_pages) for _ in range(self.source.tp)]
        self.target_caches = [poisoned_cache(self.target, self.num_pages) for _ in range(self.target.tp)]
        count = self.source.tp + self.target.tp
        self.devices = [SlowDevice(self.clock, self.copies_take_s, self.seed + rank) for rank in range(count)]
        self.senders = [
            KvSender(
                SlowMover(cache, self.devices[rank]), rank, MemorySender(self.network, f"source/{rank}"), self.clock
            )
            for rank, cache in enumerate(self.source_caches)
        ]
        self.receivers = [
            KvReceiver(
                SlowMover(cache, self.devices[self.source.tp + rank]),
                rank,
                self.staging_bytes,
                MemoryReceiver(self.network, f"target/{rank}", self.staging_bytes),
                self.clock,
            )
            for rank, cache in enumerate(self.target_caches)
        ]

    def open(
        self, name: str, pages: Sequence[int], start: int, stop: int, window: Window, late: frozenset[int] = frozenset()
    ) -> Ticket:
        """Reserve on all target ranks but the `late` ones."""
        ticket = Ticket(
            transfer_id=name,
            epoch=self.epochs.next(),
            layout=self.target,
            start_token=start,
            num_tokens=stop,
            lease_s=self.lease_s,
            endpoints=tuple(self._endpoint(rank, window) for rank in range(self.target.tp)),
        )
        for rank, receiver in enumerate(self.receivers):
            if rank not in late:
                receiver.open(self.incoming(ticket, pages))
        return ticket

    def incoming(self, ticket: Ticket, pages: Sequence[int]) -> Incoming:
        return Incoming(
            transfer_id=ticket.transfer_id,
            epoch=ticket.epoch,
            source=self.source,
            start_token=ticket.start_token,
            stop_token=ticket.num_tokens,
            pages=tuple(pages),
            window_offset=ticket.endpoints[0].window_offset,
            window_bytes=ticket.endpoints[0].window_bytes,
            lease_s=ticket.lease_s,
        )

    def begin(self, ticket: Ticket, pages: Sequence[int], dense: torch.Tensor) -> None:
        """Start on all source ranks, with the KV computed already."""
        for rank, (sender, cache) in enumerate(zip(self.senders, self.source_caches, strict=True)):
            write(cache, rank, pages, dense, range(ticket.num_tokens))
            sender.begin(ticket, pages)

    def all_ready(self, ticket: Ticket) -> None:
        for sender in self.senders:
            for layer in range(self.source.num_layers):
                sender.ready([(ticket.transfer_id, ticket.num_tokens)], [layer])
        self.senders[0].finish(ticket.transfer_id, HAND_OFF)

    def step(self, seconds: float = 0.01) -> tuple[list[list[SenderEvent]], list[list[ReceiverEvent]]]:
        """One turn of every rank's loop: events by source rank, events by target rank."""
        self.tick(seconds)
        return [sender.pump() for sender in self.senders], [receiver.poll() for receiver in self.receivers]

    def tick(self, seconds: float) -> None:
        """Time passes, in which copies go on."""
        self.clock.now += seconds
        for device in self.devices:
            device.tick()

    def _endpoint(self, rank: int, window: Window) -> RankEndpoint:
        address = f"target/{rank}"
        segment = address if self.shared_staging else ""
        return RankEndpoint(address, "memory", "host", segment, window.offset, window.size)


def shuffled_pages(of: KvLayout, num_tokens: int, num_pages: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(num_pages), -(-num_tokens // of.page_size))
