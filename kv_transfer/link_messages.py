"""KV between hosts: messages over TCP, and payloads through a link where one is up.

    sender                                receiver
      | KvMeet(token) ----------------------->|   both make their end of the link, in the background
      | KvPut(place) + header, and the payload|
      |    through the link ----------------->|   a receive is posted only for what has been announced
      |<-- KvPart(token, reason) ------------>|   the link is over; payloads go over TCP until another one is up

What was under way on a link that ends is lost, as a message may be: it is sent again, over TCP.
"""

from __future__ import annotations

from dataclasses import dataclass

from splitserve.cluster.codec import message
from splitserve.cluster.errors import ProtocolError
from splitserve.kv_transfer.protocol import unseal

MARK = b"\xc1"  # in front of what links say: no MessagePack begins with it


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


def read(data: bytes) -> object:
    """What a link's other end says; None for what cannot be read."""
    try:
        said = unseal(data[len(MARK) :])
    except ProtocolError:
        return None
    return said[0] if len(said) == 1 else None
