"""A receiver of payloads through links; how they come is in `link_messages`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from splitserve.cluster.channel import KV_IDLE_S, Pollable
from splitserve.kv_transfer.link_messages import MARK, KvMeet, KvPart, KvPut, read
from splitserve.kv_transfer.links import IDLE, PATIENCE_S, Link, Pair, make_room, not_over
from splitserve.kv_transfer.protocol import seal
from splitserve.kv_transfer.tcp import TcpReceiver
from splitserve.kv_transfer.transport import Arrival

MOST_ENDING = 64  # ends that are down and may still wait for somebody to meet, each in a thread
POSTED_LINKS = 2  # that receive at once: each holds some SMs until its payload is there


@dataclass
class _Incoming:
    """A sender's link: puts that were `announced`, with their headers, and the headers of those being received."""

    link: Link
    announced: deque[tuple[KvPut, bytes]] = field(default_factory=deque)
    posted: deque[bytes] = field(default_factory=deque)
    puts: int = 0


class LinkedReceiver:
    """Receives payloads into `staging`, uint8, through the links of its senders; all else is `control`'s.

    `meet(token)` makes this end of a pair; at most `max_links` are kept, the least recently used one leaves.
    """

    def __init__(
        self,
        control: TcpReceiver,
        staging: torch.Tensor,
        meet: Callable[[str], Pair],
        max_links: int,
        clock: Callable[[], float],
    ) -> None:
        self._control, self._staging, self._meet = control, staging, meet
        self._max_links, self._clock = max_links, clock
        self._incoming: dict[bytes, _Incoming] = {}
        self._ending: list[Link] = []

    @property
    def links(self) -> list[Link]:
        return [incoming.link for incoming in self._incoming.values()]

    @property
    def busy(self) -> bool:
        return any(incoming.posted or incoming.announced for incoming in self._incoming.values())

    def receive(self, limit: int) -> list[Arrival]:
        """Messages without a payload on its way, and those whose payload is in staging."""
        arrivals = []
        for arrival in self._control.receive(limit):
            if arrival.header.startswith(MARK):
                self._hear(arrival)
            else:
                arrivals.append(arrival)
        for peer, incoming in list(self._incoming.items()):
            landed = [incoming.posted.popleft() for _ in range(incoming.link.completed())]
            arrivals += [Arrival(peer, header, None) for header in landed]
            self._look_after(peer, incoming)
        self._post()
        return arrivals

    @property
    def sockets(self) -> list[Pollable]:
        return self._control.sockets

    def take(self, arrival: Arrival, offset: int, size: int) -> torch.Tensor:
        return self._control.take(arrival, offset, size)

    def send(self, peer: bytes, header: bytes) -> None:
        self._control.send(peer, header)

    def close(self) -> None:
        for peer in list(self._incoming):
            self._part(peer, "the receiver is shutting down")
        for link in self._ending:
            link.join(PATIENCE_S)
        self._control.close()

    def _hear(self, arrival: Arrival) -> None:
        item, peer = read(arrival.header), arrival.peer
        incoming = self._incoming.get(peer)
        match item:
            case KvMeet():
                self._accept(peer, item.token)
            case KvPart() if incoming is not None and incoming.link.token == item.token:
                self._part(peer, item.reason)
            case KvPut() if incoming is not None and incoming.link.token == item.token:
                incoming.puts += 1
                end = item.offset + item.size
                if item.number != incoming.puts or not 0 <= item.offset < end <= self._staging.numel():
                    self._part(peer, f"put {item.number} for [{item.offset}, {end}) cannot be received")
                elif arrival.payload is not None:
                    incoming.announced.append((item, bytes(arrival.payload)))

    def _accept(self, peer: bytes, token: str) -> None:
        if peer in self._incoming:
            self._part(peer, "the sender makes another link")
        self._ending = not_over(self._ending)
        if len(self._ending) >= MOST_ENDING:
            self._control.send(peer, MARK + seal(KvPart(token, "too many links have met nobody yet")))
            return
        if not make_room(self.links, self._ending, self._max_links):
            self._control.send(peer, MARK + seal(KvPart(token, "the receiver has no memory for another link")))
            return
        # Less than the sender's: it hears of a link that is stuck, and one that waits for its turn is not given up.
        self._incoming[peer] = _Incoming(Link(token, lambda: self._meet(token), PATIENCE_S / 3, self._clock))

    def _look_after(self, peer: bytes, incoming: _Incoming) -> None:
        link = incoming.link
        if link.idle and not incoming.announced and self._clock() - link.used_at > KV_IDLE_S:
            link.drop(IDLE)
        if link.state == "down":
            self._part(peer, link.reason)

    def _part(self, peer: bytes, reason: str) -> None:
        link = self._incoming.pop(peer).link
        link.drop(reason)
        self._ending = [*not_over(self._ending), link]
        self._control.send(peer, MARK + seal(KvPart(link.token, reason)))

    def _post(self) -> None:
        """Post receives of as many links as may be at it, in the order in which each link's puts were announced."""
        posted = sum(bool(incoming.posted) for incoming in self._incoming.values())
        for incoming in self._incoming.values():
            if incoming.link.state != "up" or not (incoming.announced or incoming.posted):
                continue
            if not incoming.posted:
                if posted == POSTED_LINKS:
                    continue
                posted += 1
            while incoming.announced:
                put, header = incoming.announced.popleft()
                incoming.link.receive(self._staging[put.offset : put.offset + put.size])
                incoming.posted.append(header)
