"""What carries frames from a sending to a receiving rank.

Over TCP (tcp.py), between hosts through NCCL (linked_sender.py, linked_receiver.py), within one through memory that
both reach (segments.py, local.py), and within a process, with faults, for tests (memory.py).

A transport moves bytes and knows nothing of transfers. It may lose, repeat, delay, reorder or damage whatever it
carries; sender and receiver are built for that. It never raises for what a peer did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from splitserve.cluster.channel import Pollable
from splitserve.cluster.counts import Transport
from splitserve.cluster.messages import RankEndpoint
from splitserve.kv_transfer.staging import FrameSizes


@dataclass(frozen=True)
class Arrival:
    """One message as it came: the `peer` to answer, the sealed header, and the payload if that travelled along."""

    peer: bytes
    header: bytes
    payload: memoryview | None


class SenderTransport(Protocol):
    def connect(self, target: RankEndpoint) -> None:
        """Prepare to send to `target`. Raises TransferFailed when its address or staging cannot be used."""

    def frame_sizes(self, target: RankEndpoint) -> FrameSizes:
        """What payloads for `target` should take. Raises as `connect` does."""

    def place(self, target: RankEndpoint, offset: int, size: int) -> torch.Tensor | None:
        """Where to pack `size` bytes meant for `offset` of the target's staging: uint8, on a GPU if that is there.

        None while there is no room to pack. Raises TransferFailed when the target's staging is gone or does not have
        that place.
        """

    def reaches(self, target: RankEndpoint) -> bool:
        """Whether what is packed is at the target by that: frames bring no payloads along."""

    def way(self, target: RankEndpoint) -> Transport:
        """What carries payloads to `target` now."""

    @property
    def links_up(self) -> int:
        """NCCL communicators that are up."""

    def send(self, target: RankEndpoint, header: bytes, payload: torch.Tensor | None = None, offset: int = 0) -> None:
        """Send without waiting. `payload` is what `place` returned for `offset`, filled; it is not touched again."""

    def receive(self) -> list[bytes]:
        """Sealed replies that have come."""

    @property
    def sockets(self) -> list[Pollable]:
        """Those that `receive` reads, for whoever waits for news."""

    def close(self) -> None: ...


class ReceiverTransport(Protocol):
    def receive(self, limit: int) -> list[Arrival]:
        """Up to `limit` messages that have come."""

    @property
    def sockets(self) -> list[Pollable]:
        """Those that `receive` reads, for whoever waits for news."""

    @property
    def busy(self) -> bool:
        """Whether payloads are on their way in, which no socket tells of."""

    def take(self, arrival: Arrival, offset: int, size: int) -> torch.Tensor:
        """The arrival's payload, uint8 [size], valid until the next call.

        On a GPU a peer may still write there: whoever moves it must read each word once, and sum what it has read.
        Raises TransferFailed when it is not `size` bytes long.
        """

    def send(self, peer: bytes, header: bytes) -> None:
        """Answer a peer without waiting."""

    def close(self) -> None: ...
