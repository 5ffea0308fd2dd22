"""What a sending and a receiving rank say to each other, and what they tell their engines.

    sender                                   receiver
      | KvFrame + payload (some layers, some tokens) -->|   written into the sender's share of the window
      |<--------------------------------- KvAck | KvNack |   in the pages: the slot is free again | send it again
      | KvRenew ---------------------------------------->|   nothing to send yet, and still at it
      | KvFinish(hand-off) ----------------------------->|   rank 0 to rank 0, where no frame could carry it
      |<---------------------- KvAck(HAND_OFF_SEQUENCE) -|
      |<----------------------------------------- KvGone |   that epoch is not live: stop
      | KvDrained -------------------------------------->|   this rank writes the window no more

Any of these may be lost, repeated or late. Frames and KvFinish are sent again until they are acknowledged; for the
others a lease stands in. What is said to one peer at a time, of however many transfers, travels together, sealed with a
hash behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from splitserve.cluster.codec import JOIN_BYTES, join, message, pack, unpack_all
from splitserve.cluster.errors import ProtocolError
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff

MAX_HEADER_BYTES = 16 * 1024
SEAL_BYTES = 8
MOST_TOGETHER = MAX_HEADER_BYTES - SEAL_BYTES - JOIN_BYTES  # of messages in a parcel
HAND_OFF_SEQUENCE = 0


@message
@dataclass(frozen=True)
class KvFrame:
    """Header of a payload [layers, planes, heads, tokens, head_dim] that lies at `offset` of the target's staging.

    `layers` and `tokens` are [start, stop); heads are those of the piece between the two ranks. `sequence` numbers
    the frames of a source rank in a transfer, from 1. From rank 0 to rank 0 it carries the hand-off, if that is known.
    """

    transfer_id: str
    epoch: int
    source_rank: int
    target_rank: int
    sequence: int
    layers: tuple[int, int]
    tokens: tuple[int, int]
    offset: int
    checksum: int
    hand_off: HandOff | None = None

    def identity(self) -> bytes:
        """Which part of which transfer this is, and where it lies."""
        where = (self.source_rank, self.target_rank, self.sequence, self.layers, self.tokens, self.offset)
        return f"{self.transfer_id} {self.epoch} {where}".encode()


@message
@dataclass(frozen=True)
class KvFinish:
    transfer_id: str
    epoch: int
    source_rank: int
    hand_off: HandOff


@message
@dataclass(frozen=True)
class KvRenew:
    transfer_id: str
    epoch: int
    source_rank: int


@message
@dataclass(frozen=True)
class KvDrained:
    """`reason` says why the sender stopped, where it stopped early."""

    transfer_id: str
    epoch: int
    source_rank: int
    reason: str


@message
@dataclass(frozen=True)
class KvAck:
    """`hand_off`: that is here, too."""

    transfer_id: str
    epoch: int
    sequence: int
    hand_off: bool


@message
@dataclass(frozen=True)
class KvNack:
    transfer_id: str
    epoch: int
    sequence: int


@message
@dataclass(frozen=True)
class KvGone:
    transfer_id: str
    epoch: int
    reason: str


FromSender = KvFrame | KvFinish | KvRenew | KvDrained
FromReceiver = KvAck | KvNack | KvGone


@message
@dataclass(frozen=True)
class Incoming:
    """A transfer as one receiving rank must know it: the KV of positions [start_token, stop_token) from `source`.

    `pages` cover the sequence from its first token on; those before `start_token` are not written.
    """

    transfer_id: str
    epoch: int
    source: KvLayout
    start_token: int
    stop_token: int
    pages: tuple[int, ...]
    window_offset: int
    window_bytes: int
    lease_s: float


@message
@dataclass(frozen=True)
class Verified:
    """All KV of the transfer lies in this rank's pages. Rank 0's event carries the hand-off, the others None."""

    transfer_id: str
    hand_off: HandOff | None


@message
@dataclass(frozen=True)
class ReceiveFailed:
    """The transfer is over on this rank. Nothing writes its pages any more; its window comes back with Freed."""

    transfer_id: str
    reason: str


@message
@dataclass(frozen=True)
class Freed:
    """Nobody writes this transfer's window on this rank any more."""

    transfer_id: str


@message
@dataclass(frozen=True)
class Sent:
    """The target ranks have all that this rank owed them; its pages are free to go."""

    transfer_id: str


@message
@dataclass(frozen=True)
class SendFailed:
    transfer_id: str
    reason: str


ReceiverEvent = Verified | ReceiveFailed | Freed
SenderEvent = Sent | SendFailed


def seal(*messages: object) -> bytes:
    return _sealed([pack(each) for each in messages])


def seal_all(messages: Iterable[object]) -> Iterator[bytes]:
    """All of `messages`, in order, in as few parcels as hold them."""
    packed: list[bytes] = []
    size = 0
    for data in map(pack, messages):
        if packed and size + len(data) > MOST_TOGETHER:
            yield _sealed(packed)
            packed, size = [], 0
        packed.append(data)
        size += len(data)
    yield _sealed(packed)


def unseal(sealed: bytes | memoryview) -> list[object]:
    """The messages in `sealed`. Raises ProtocolError when it is too long, or damaged, or one of them is no message."""
    if len(sealed) > MAX_HEADER_BYTES:
        raise ProtocolError(f"header of {len(sealed)} bytes exceeds {MAX_HEADER_BYTES}")
    data = bytes(sealed[:-SEAL_BYTES])
    if _digest(data) != sealed[-SEAL_BYTES:]:
        raise ProtocolError("header does not match its seal")
    return unpack_all(data)


def _sealed(packed: Sequence[bytes]) -> bytes:
    data = join(packed)
    return data + _digest(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=SEAL_BYTES).digest()
