"""KV between processes of one host: payloads in a segment of the receiver's that both reach, headers over Unix sockets.

Where these do not reach, headers take the way of all else. A segment is a file in /dev/shm (shm.py), or memory of the
receiver's GPU into which the sender's packs pages (cuda_ipc.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from splitserve.cluster.channel import KV_IDLE_S, Pollable
from splitserve.cluster.counts import Transport
from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.messages import RankEndpoint
from splitserve.kv_transfer.local import LocalPeers
from splitserve.kv_transfer.staging import FrameSizes
from splitserve.kv_transfer.transport import Arrival, ReceiverTransport, SenderTransport

logger = logging.getLogger(__name__)

BURST = 64  # replies that are taken at once


class Unreachable(TransferFailed):
    """The segment may be there, but this process's device has no way to it."""


class Segment(Protocol):
    """A receiver's staging area, `bytes` uint8 [its size], which others attach by its `name`."""

    name: str
    bytes: torch.Tensor

    def take(self, offset: int, size: int) -> torch.Tensor:
        """uint8 [size], valid until the next call: what lies at `offset`, for a mover to sum as it reads it."""

    def close(self) -> None: ...


class AttachedSegment(Protocol):
    """Another process's segment: `bytes` uint8 [its size], and the sizes of frames that suit it."""

    bytes: torch.Tensor
    frame_sizes: FrameSizes

    def close(self) -> None:
        """Let go of it, once nothing of this process writes there any more."""


Attach = Callable[[str], AttachedSegment]


class SegmentReceiver:
    """Takes frames whose payload lies in `segment`, and over `control` those that bring theirs along."""

    def __init__(self, control: ReceiverTransport, segment: Segment) -> None:
        self._control, self._segment = control, segment
        self._local = LocalPeers(segment.name)

    def receive(self, limit: int) -> list[Arrival]:
        # Half at most, rounded up: else senders of other hosts and of this one could shut out each other.
        arrivals = self._control.receive(-(-limit // 2))
        return arrivals + [Arrival(peer, header, None) for peer, header in self._local.receive(limit - len(arrivals))]

    @property
    def sockets(self) -> list[Pollable]:
        return [*self._local.sockets, *self._control.sockets]

    @property
    def busy(self) -> bool:
        return self._control.busy

    def take(self, arrival: Arrival, offset: int, size: int) -> torch.Tensor:
        if arrival.payload is not None:
            return self._control.take(arrival, offset, size)
        return self._segment.take(offset, size)

    def send(self, peer: bytes, header: bytes) -> None:
        (self._local if peer in self._local else self._control).send(peer, header)

    def close(self) -> None:
        self._control.close()
        self._local.close()
        self._segment.close()


@dataclass
class _Attached:
    segment: AttachedSegment
    used_at: float


class HostSender:
    """Writes into segments of this `host` that it can attach, and leaves all other targets to `control`.

    `attach` has a function for each transport of `RankEndpoint` that it knows; one that raises Unreachable is not asked
    again for that segment. A segment that was not used for a minute is let go of.
    """

    def __init__(
        self, control: SenderTransport, host: str, attach: Mapping[str, Attach], clock: Callable[[], float]
    ) -> None:
        self._control, self._host, self._attach, self._clock = control, host, attach, clock
        self._attached: dict[str, _Attached] = {}
        self._unreachable: set[str] = set()
        self._local = LocalPeers()

    def connect(self, target: RankEndpoint) -> None:
        reached = self._segment(target) is not None
        if target.segment.encode() not in self._local:
            self._control.connect(replace(target, link="") if reached else target)

    def frame_sizes(self, target: RankEndpoint) -> FrameSizes:
        segment = self._segment(target)
        return self._control.frame_sizes(target) if segment is None else segment.frame_sizes

    def place(self, target: RankEndpoint, offset: int, size: int) -> torch.Tensor | None:
        segment = self._segment(target)
        if segment is None:
            return self._control.place(target, offset, size)
        if offset + size > segment.bytes.numel():
            found = f"{target.segment} has {segment.bytes.numel()} bytes"
            raise TransferFailed(f"segment: {found}; a frame ends at {offset + size}")
        return segment.bytes.narrow(0, offset, size)

    def reaches(self, target: RankEndpoint) -> bool:
        known = target.transport in self._attach and target.host == self._host
        return known and target.segment not in self._unreachable

    def way(self, target: RankEndpoint) -> Transport:
        return target.transport if self.reaches(target) else self._control.way(target)

    @property
    def links_up(self) -> int:
        return self._control.links_up

    def send(self, target: RankEndpoint, header: bytes, payload: torch.Tensor | None = None, offset: int = 0) -> None:
        if (peer := target.segment.encode()) in self._local:
            self._local.send(peer, header)
        else:
            self._control.send(target, header, None if self.reaches(target) else payload, offset)

    def receive(self) -> list[bytes]:
        for name, attached in list(self._attached.items()):
            if self._clock() - attached.used_at > KV_IDLE_S:  # its receiver may be gone, and its memory with this
                self._detach(name)
        return [header for _, header in self._local.receive(BURST)] + self._control.receive()

    @property
    def sockets(self) -> list[Pollable]:
        return [*self._local.sockets, *self._control.sockets]

    def close(self) -> None:
        self._control.close()
        for name in list(self._attached):
            self._detach(name)
        self._local.close()

    def _detach(self, name: str) -> None:
        self._attached.pop(name).segment.close()
        self._local.drop(name.encode())

    def _segment(self, target: RankEndpoint) -> AttachedSegment | None:
        if not self.reaches(target):
            return None
        attached = self._attached.get(target.segment)
        if attached is None:
            try:
                attached = _Attached(self._attach[target.transport](target.segment), self._clock())
            except Unreachable as error:
                logger.warning("KV for %s takes another way: %s", target.address, error)
                self._unreachable.add(target.segment)
                return None
            self._attached[target.segment] = attached
            self._local.connect(target.segment.encode(), target.segment)
        attached.used_at = self._clock()
        return attached.segment
