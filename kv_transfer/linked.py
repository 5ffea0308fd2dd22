"""KV between hosts: messages over TCP, and payloads through a link where one is up.

    sender                                receiver
      | KvMeet(token) ----------------------->|   both make their end of the link, in the background
      | KvPut(place) + header, and the payload|
      |    through the link ----------------->|   a receive is posted only for what has been announced
      |<-- KvPart(token, reason) ------------>|   the link is over; payloads go over TCP until another one is up

What was under way on a link that ends is lost, as a message may be: it is sent again, over TCP.
"""

from __future__ import annotations

import logging
import secrets
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from splitserve.cluster.channel import KV_IDLE_S, Socket
from splitserve.cluster.codec import message
from splitserve.cluster.counts import Transport
from splitserve.cluster.errors import ProtocolError
from splitserve.cluster.messages import RankEndpoint
from splitserve.cluster.topology import PACKED_BYTES
from splitserve.kv_transfer.links import Link, Pair
from splitserve.kv_transfer.protocol import seal, unseal
from splitserve.kv_transfer.staging import FrameSizes
from splitserve.kv_transfer.tcp import TcpReceiver, TcpSender
from splitserve.kv_transfer.transport import Arrival

logger = logging.getLogger(__name__)

MARK = b"\xc1"  # in front of what links say: no MessagePack begins with it
FRAMES = FrameSizes(16 << 20, 32 << 20)
IDLE = "not used"
RETRY_S = 1.0, 30.0  # after a link has ended: at first, and at most
PATIENCE_S = 3.0  # a payload takes milliseconds: one that takes this long has lost its other end
MOST_ENDING = 64  # ends that are down and may still wait for somebody to meet, each in a thread
POSTED_LINKS = 2  # that receive at once: each holds some SMs until its payload is there


@message
@dataclass(frozen=True)
class KvMeet:
    token: str


@message
@dataclass(frozen=True)
class KvPut:
    """The `number`-th payload of the link, from 1, is `size` bytes for `offset` of the receiver's staging."""

    token: str
    number: int
    offset: int
    size: int


@message
@dataclass(frozen=True)
class KvPart:
    token: str
    reason: str


@dataclass
class _Peer:
    """A target, and the link to it. `puts` are those announced on it; `failures` are in a row."""

    link: Link | None = None
    puts: int = 0
    failures: int = 0
    retry_at: float = 0.0


class LinkedSender:
    """Sends payloads from `device` through links to targets that offer one, and all else by `control`.

    `meet(endpoint, token)` makes this end of a pair; at most `max_links` are kept, the least recently used one leaves.
    """

    def __init__(
        self,
        control: TcpSender,
        device: torch.device,
        meet: Callable[[str, str], Pair],
        max_links: int,
        clock: Callable[[], float],
    ) -> None:
        self._control, self._device, self._meet = control, device, meet
        self._max_links, self._clock = max_links, clock
        self._peers: dict[str, _Peer] = {}
        self._ending: list[Link] = []
        self._packed: list[weakref.ref[torch.Tensor]] = []
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @property
    def links(self) -> list[Link]:
        return [peer.link for peer in self._peers.values() if peer.link is not None]

    def connect(self, target: RankEndpoint) -> None:
        self._control.connect(target)
        self._link(target)

    def frame_sizes(self, target: RankEndpoint) -> FrameSizes:
        return FRAMES if target.link else self._control.frame_sizes(target)

    def place(self, target: RankEndpoint, offset: int, size: int) -> torch.Tensor | None:
        link = self._link(target)
        if link is None or link.state != "up":
            return self._control.place(target, offset, size)
        self._packed = [ref for ref in self._packed if ref() is not None]
        taken = sum(tensor.numel() for ref in self._packed if (tensor := ref()) is not None)
        if taken and taken + size > PACKED_BYTES:
            return None
        # Of a stream of its own: memory that the engine has just given up may still be in use by what it has launched.
        with torch.cuda.stream(self._side):
            payload = torch.empty(size, dtype=torch.uint8, device=self._device)
        self._packed.append(weakref.ref(payload))
        return payload

    def way(self, target: RankEndpoint) -> Transport:
        peer = self._peers.get(target.address)
        linked = peer is not None and peer.link is not None and peer.link.state == "up"
        return "nccl" if linked else self._control.way(target)

    @property
    def links_up(self) -> int:
        return sum(link.state == "up" for link in self.links)

    def send(self, target: RankEndpoint, header: bytes, payload: torch.Tensor | None = None, offset: int = 0) -> None:
        if payload is None or not any(ref() is payload for ref in self._packed):
            self._control.send(target, header, payload)
            return
        peer = self._peers.get(target.address)
        if peer is None or peer.link is None or peer.link.state != "up":
            return  # lost with the link; the frame is due again, and then goes over TCP
        peer.puts += 1
        put = KvPut(peer.link.token, peer.puts, offset, payload.numel())
        self._control.send_parts(target, [MARK + seal(put), header])
        peer.link.send(payload)

    def receive(self) -> list[bytes]:
        replies = []
        for reply in self._control.receive():
            if reply.startswith(MARK):
                self._hear(reply)
            else:
                replies.append(reply)
        for address, peer in list(self._peers.items()):
            self._look_after(address, peer)
            if peer.link is None and self._clock() - peer.retry_at > KV_IDLE_S:
                del self._peers[address]
        return replies

    @property
    def sockets(self) -> list[Socket]:
        return self._control.sockets

    def close(self) -> None:
        for link in self.links:
            link.drop("the sender is shutting down")
        for link in [*self.links, *self._ending]:
            link.join(PATIENCE_S)
        self._control.close()

    def _link(self, target: RankEndpoint) -> Link | None:
        """The link to `target`, a new one where there is none and it is time for one."""
        if not target.link:
            return None
        peer = self._peers.setdefault(target.address, _Peer())
        if (
            peer.link is None
            and self._clock() >= peer.retry_at
            and _make_room(self.links, self._ending, self._max_links)
        ):
            token = secrets.token_hex(8)
            self._control.send_parts(target, [MARK + seal(KvMeet(token))])
            peer.link, peer.puts = Link(token, lambda: self._meet(target.link, token), PATIENCE_S, self._clock), 0
        if peer.link is not None:
            peer.link.used_at = self._clock()
        return peer.link

    def _look_after(self, address: str, peer: _Peer) -> None:
        link = peer.link
        if link is None:
            return
        if link.completed():
            peer.failures = 0
        if link.idle and self._clock() - link.used_at > KV_IDLE_S:
            link.drop(IDLE)
        if link.state == "down":
            if link.reason != IDLE:
                peer.failures += 1
                first, most = RETRY_S
                peer.retry_at = self._clock() + min(most, first * 2 ** (peer.failures - 1))
                logger.warning("KV for %s goes over TCP for now: %s", address, link.reason)
            peer.link, self._ending = None, [*_not_over(self._ending), link]

    def _hear(self, reply: bytes) -> None:
        part = _read(reply)
        for link in self.links:
            if isinstance(part, KvPart) and link.token == part.token:
                link.drop(part.reason)


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
    def sockets(self) -> list[Socket]:
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
        item, peer = _read(arrival.header), arrival.peer
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
        self._ending = _not_over(self._ending)
        if len(self._ending) >= MOST_ENDING:
            self._control.send(peer, MARK + seal(KvPart(token, "too many links have met nobody yet")))
            return
        if not _make_room(self.links, self._ending, self._max_links):
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
        self._ending = [*_not_over(self._ending), link]
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


def _make_room(links: list[Link], ending: list[Link], most: int) -> bool:
    """Whether another link may be made, after the idle one that was used longest ago has left, where that helps.

    An end that is down counts while it has its communicator: one that has met nobody may wait for that for good.
    """
    if len(links) + sum(link.is_aborting for link in ending) < most:
        return True
    idle = [link for link in links if link.state == "up" and link.idle]
    if idle:
        min(idle, key=lambda link: link.used_at).drop(IDLE)
    return False


def _not_over(ending: list[Link]) -> list[Link]:
    return [link for link in ending if not link.join(0)]


def _read(data: bytes) -> object:
    """What a link's other end says; None for what cannot be read."""
    try:
        return unseal(data[len(MARK) :])
    except ProtocolError:
        return None
