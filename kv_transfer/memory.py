"""A transport within one process, with faults on demand: for tests."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from splitserve.cluster.channel import Pollable
from splitserve.cluster.counts import Transport
from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.messages import RankEndpoint
from splitserve.kv_transfer.staging import HOST_FRAMES, FrameSizes
from splitserve.kv_transfer.transport import Arrival


@dataclass(frozen=True)
class Faults:
    """Chances of each fault for each message, and the longest delay in seconds. Delays alone make messages overtake."""

    drop: float = 0.0
    repeat: float = 0.0
    corrupt: float = 0.0
    delay_s: float = 0.0


@dataclass(frozen=True)
class _Parcel:
    origin: str
    header: bytes
    payload: bytes | None


class MemoryNetwork:
    """Where memory transports meet, by address. The same `seed` gives the same faults.

    An endpoint that names a `segment` has staging that senders write straight into, as shared memory has: there a
    sender's late write really happens, whatever becomes of the header that announces it.
    """

    def __init__(self, clock: Callable[[], float], seed: int = 0, faults: Faults = Faults()) -> None:
        self.faults = faults
        self.staging: dict[str, torch.Tensor] = {}
        self._clock = clock
        self._random = random.Random(seed)
        self._order = itertools.count()
        self._boxes: dict[str, list[tuple[float, int, _Parcel]]] = defaultdict(list)

    def post(self, address: str, origin: str, header: bytes, payload: bytes | None = None) -> None:
        """Send to `address`, with whatever faults strike."""
        parcel = _Parcel(origin, header, payload)
        for _ in range(1 + self._strikes(self.faults.repeat)):
            if self._strikes(self.faults.drop):
                continue
            sent = self._damage(parcel) if self._strikes(self.faults.corrupt) else parcel
            due = self._clock() + self._random.uniform(0, self.faults.delay_s)
            heapq.heappush(self._boxes[address], (due, next(self._order), sent))

    def collect(self, address: str, limit: int) -> list[_Parcel]:
        """Up to `limit` parcels for `address` that are due."""
        box, now = self._boxes[address], self._clock()
        parcels: list[_Parcel] = []
        while box and box[0][0] <= now and len(parcels) < limit:
            parcels.append(heapq.heappop(box)[2])
        return parcels

    def _strikes(self, chance: float) -> bool:
        return self._random.random() < chance

    def _damage(self, parcel: _Parcel) -> _Parcel:
        if parcel.payload and self._strikes(0.5):
            return _Parcel(parcel.origin, parcel.header, self._flip(parcel.payload))
        return _Parcel(parcel.origin, self._flip(parcel.header), parcel.payload)

    def _flip(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._random.randint(1, 8)):
            changed[self._random.randrange(len(data))] ^= self._random.randint(1, 255)
        return bytes(changed)


class MemorySender:
    sockets: ClassVar[list[Pollable]] = []
    links_up = 0

    def __init__(self, network: MemoryNetwork, address: str) -> None:
        self._network, self._address = network, address

    def connect(self, target: RankEndpoint) -> None:
        """Nothing to prepare."""

    def frame_sizes(self, target: RankEndpoint) -> FrameSizes:
        return FrameSizes(0, HOST_FRAMES.most)

    def place(self, target: RankEndpoint, offset: int, size: int) -> torch.Tensor:
        if not target.segment:
            return torch.empty(size, dtype=torch.uint8)
        return self._network.staging[target.segment][offset : offset + size]

    def reaches(self, target: RankEndpoint) -> bool:
        return bool(target.segment)

    def way(self, target: RankEndpoint) -> Transport:
        return "memory"

    def send(self, target: RankEndpoint, header: bytes, payload: torch.Tensor | None = None, offset: int = 0) -> None:
        carried = None if payload is None or target.segment else payload.numpy().tobytes()
        self._network.post(target.address, self._address, header, carried)

    def receive(self) -> list[bytes]:
        return [parcel.header for parcel in self._network.collect(self._address, limit=1000)]

    def close(self) -> None:
        """Nothing to close."""


class MemoryReceiver:
    sockets: ClassVar[list[Pollable]] = []
    busy = False

    def __init__(self, network: MemoryNetwork, address: str, staging_bytes: int) -> None:
        self._network, self._address = network, address
        network.staging[address] = torch.zeros(staging_bytes, dtype=torch.uint8)

    def receive(self, limit: int) -> list[Arrival]:
        parcels = self._network.collect(self._address, limit)
        return [
            Arrival(
                parcel.origin.encode(), parcel.header, None if parcel.payload is None else memoryview(parcel.payload)
            )
            for parcel in parcels
        ]

    def take(self, arrival: Arrival, offset: int, size: int) -> torch.Tensor:
        if arrival.payload is None:
            return self._network.staging[self._address][offset : offset + size].clone()
        if len(arrival.payload) != size:
            raise TransferFailed(f"payload: found {len(arrival.payload)} bytes, expected {size}")
        return torch.frombuffer(bytearray(arrival.payload), dtype=torch.uint8)

    def send(self, peer: bytes, header: bytes) -> None:
        self._network.post(peer.decode(), self._address, header)

    def close(self) -> None:
        del self._network.staging[self._address]
