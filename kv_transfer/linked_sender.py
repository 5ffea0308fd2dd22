"""A sender whose payloads go through links; how is in `link_messages`."""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

from splitserve.cluster.channel import KV_IDLE_S, Pollable
from splitserve.cluster.counts import Transport
from splitserve.cluster.messages import RankEndpoint
from splitserve.cluster.topology import PACKED_BYTES
from splitserve.kv_transfer.link_messages import MARK, KvMeet, KvPart, KvPut, read
from splitserve.kv_transfer.links import IDLE, PATIENCE_S, Link, Pair, make_room, not_over
from splitserve.kv_transfer.protocol import seal
from splitserve.kv_transfer.staging import LINK_FRAMES, FrameSizes
from splitserve.kv_transfer.tcp import TcpSender

logger = logging.getLogger(__name__)

RETRY_S = 1.0, 30.0  # after a link has ended: at first, and at most


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
        return LINK_FRAMES if self.way(target) == "nccl" else self._control.frame_sizes(target)

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

    def reaches(self, target: RankEndpoint) -> bool:
        return False

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
    def sockets(self) -> list[Pollable]:
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
            and make_room(self.links, self._ending, self._max_links)
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
            peer.link, self._ending = None, [*not_over(self._ending), link]

    def _hear(self, reply: bytes) -> None:
        part = read(reply)
        for link in self.links:
            if isinstance(part, KvPart) and link.token == part.token:
                link.drop(part.reason)
