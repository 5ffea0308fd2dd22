"""KV over TCP: the receiving rank binds a ZeroMQ ROUTER, sending ranks connect a DEALER to each target.

A message is the sealed header and, behind a frame's, the payload, which is copied neither into nor out of ZeroMQ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zmq

from splitserve.cluster.channel import KV_IDLE_S, CurveKeys, Pollable, Socket, bind, secure
from splitserve.cluster.counts import Transport
from splitserve.cluster.errors import StartupError, TransferFailed
from splitserve.cluster.messages import RankEndpoint
from splitserve.kv_transfer.staging import HOST_FRAMES, LINK_FRAMES, FrameSizes
from splitserve.kv_transfer.transport import Arrival

QUEUE_MESSAGES = 256
MOST_BYTES = LINK_FRAMES.most + (1 << 20)  # of a frame whose link went down


class TcpReceiver:
    """Takes frames at `bind_address` (a host without port). `endpoint` is where senders connect.

    Raises StartupError when the address cannot be bound.
    """

    def __init__(self, bind_address: str, keys: CurveKeys | None = None) -> None:
        self._socket = _socket(zmq.ROUTER, keys, server=True)
        try:
            self.endpoint = bind(self._socket, bind_address)
        except StartupError:
            self.close()
            raise

    def receive(self, limit: int) -> list[Arrival]:
        arrivals: list[Arrival] = []
        while len(arrivals) < limit and _has_news(self._socket):
            peer, header, *payload = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            arrivals.append(Arrival(peer.bytes, header.bytes, payload[0].buffer if payload else None))
        return arrivals

    @property
    def sockets(self) -> list[Pollable]:
        return [self._socket]

    @property
    def busy(self) -> bool:
        return False

    def take(self, arrival: Arrival, offset: int, size: int) -> torch.Tensor:
        found = 0 if arrival.payload is None else len(arrival.payload)
        if arrival.payload is None or found != size:
            raise TransferFailed(f"payload: found {found} bytes, expected {size}")
        return torch.from_numpy(np.frombuffer(arrival.payload, dtype=np.uint8))

    def send(self, peer: bytes, header: bytes) -> None:
        _send(self._socket, [peer, header])

    def close(self) -> None:
        self._socket.close(linger=0)


@dataclass
class _Link:
    socket: Socket
    used_at: float


class TcpSender:
    """Keeps a connection to each target that was used within the last minute."""

    links_up = 0

    def __init__(self, clock: Callable[[], float], keys: CurveKeys | None = None) -> None:
        self.clock, self._keys = clock, keys
        self._links: dict[str, _Link] = {}

    def connect(self, target: RankEndpoint) -> None:
        self._link(target.address)

    def frame_sizes(self, target: RankEndpoint) -> FrameSizes:
        return HOST_FRAMES

    def place(self, target: RankEndpoint, offset: int, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def reaches(self, target: RankEndpoint) -> bool:
        return False

    def way(self, target: RankEndpoint) -> Transport:
        return "tcp"

    def send(self, target: RankEndpoint, header: bytes, payload: torch.Tensor | None = None, offset: int = 0) -> None:
        self.send_parts(target, [header] if payload is None else [header, payload.numpy()])

    def send_parts(self, target: RankEndpoint, parts: list[Any]) -> None:
        """Send a message of one or two parts."""
        _send(self._link(target.address), parts)

    def receive(self) -> list[bytes]:
        headers: list[bytes] = []
        for address, link in list(self._links.items()):
            while _has_news(link.socket):
                headers.append(link.socket.recv(zmq.NOBLOCK))
            if self.clock() - link.used_at > KV_IDLE_S:
                link.socket.close(linger=0)
                del self._links[address]
        return headers

    @property
    def sockets(self) -> list[Pollable]:
        return [link.socket for link in self._links.values()]

    def close(self) -> None:
        """Close all connections; what was sent just before still has a moment to leave."""
        for link in self._links.values():
            link.socket.close(linger=100)
        self._links.clear()

    def _link(self, address: str) -> Socket:
        link = self._links.get(address)
        if link is None:
            link = self._links[address] = _Link(self._connected(address), self.clock())
        link.used_at = self.clock()
        return link.socket

    def _connected(self, address: str) -> Socket:
        socket = _socket(zmq.DEALER, self._keys, server=False)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            socket.close(linger=0)
            raise TransferFailed(f"address: found {address!r}; {error.strerror}") from error
        return socket


def _socket(kind: int, keys: CurveKeys | None, *, server: bool) -> Socket:
    socket: Socket = zmq.Context.instance().socket(kind)
    secure(socket, keys, server=server)
    # Payloads queue here, so bounds are tighter than for other messages. What does not fit is lost, and sent again.
    socket.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
    socket.setsockopt(zmq.SNDHWM, QUEUE_MESSAGES)
    socket.setsockopt(zmq.RCVHWM, QUEUE_MESSAGES)
    return socket


def _has_news(socket: Socket) -> bool:
    """Half the price of a `recv` that fails, in loops that mostly find nothing."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & int(zmq.POLLIN))


def _send(socket: Socket, parts: list[Any]) -> None:
    with contextlib.suppress(zmq.Again):
        socket.send_multipart(parts, zmq.NOBLOCK, copy=False)
