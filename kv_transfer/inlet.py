"""Where an engine's KV comes from: over the wire from another engine, or, colocated, from the same pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from splitserve.cluster.channel import Pollable
from splitserve.cluster.codec import message
from splitserve.cluster.counts import BytesUsed
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff, RankEndpoint, Ticket
from splitserve.engine.block_manager import BlockTable
from splitserve.engine.ranks import Agreement, Handlers, Ranks
from splitserve.kv_transfer.protocol import Freed, Incoming, ReceiveFailed, Verified
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.staging import EpochSource, Window, WindowAllocator, window_size

WINDOWS_PER_STAGING = 4  # a long prompt takes at most this part of the staging area, so that others can land beside it


@dataclass(frozen=True)
class Landed:
    """On every rank, all KV of the transfer is in its pages."""

    transfer_id: str
    hand_off: HandOff


@dataclass(frozen=True)
class Lost:
    transfer_id: str
    reason: str


class KvInlet(Protocol):
    """What an engine needs to know of the way that KV takes to it."""

    def open(self, transfer_id: str, source: KvLayout, table: BlockTable, stop_token: int) -> Ticket | None:
        """Leave to send into `table` what it lacks before `stop_token`; None when there is no staging room now."""

    def expect(self, transfer_id: str) -> None:
        """Prepare for what `open` has granted, once the answer is on its way: the sender has not begun yet."""

    def close(self, transfer_id: str) -> None:
        """The engine's part is over: KV that still comes in for this transfer reaches no page."""

    def poll(self) -> list[Landed | Lost]: ...

    @property
    def staging(self) -> BytesUsed:
        """What is granted of one rank's staging."""


@message
@dataclass(frozen=True)
class OpenReceive:
    incoming: Incoming


@message
@dataclass(frozen=True)
class CommitReceive:
    transfer_id: str


@message
@dataclass(frozen=True)
class AbortReceive:
    transfer_id: str
    reason: str


class ReceiveService:
    """A receiving rank's part of every transfer."""

    def __init__(self, receiver: KvReceiver) -> None:
        self._receiver = receiver
        self.handlers: Handlers = {
            OpenReceive: lambda command: receiver.open(command.incoming),
            CommitReceive: lambda command: receiver.commit(command.transfer_id),
            AbortReceive: lambda command: receiver.abort(command.transfer_id, command.reason),
        }

    @property
    def sockets(self) -> list[Pollable]:
        return self._receiver.sockets

    @property
    def busy(self) -> bool:
        return self._receiver.busy

    def poll(self) -> list[object]:
        return list(self._receiver.poll())


@dataclass
class _Transfer:
    window: Window
    incoming: Incoming
    hand_off: HandOff | None = None
    landed: bool = False


class ReceiveInlet:
    """KV comes from other engines. A transfer is committed on all ranks or on none."""

    def __init__(
        self,
        ranks: Ranks,
        layout: KvLayout,
        endpoints: Sequence[RankEndpoint],
        staging: WindowAllocator,
        lease_s: float,
    ) -> None:
        self._ranks, self._layout, self._endpoints = ranks, layout, endpoints
        self._staging, self._lease_s = staging, lease_s
        self._epochs = EpochSource()
        self._transfers: dict[str, _Transfer] = {}
        self._verified = Agreement(ranks.size)
        self._freed = Agreement(ranks.size)

    def open(self, transfer_id: str, source: KvLayout, table: BlockTable, stop_token: int) -> Ticket | None:
        if transfer_id in self._transfers:
            return None
        tokens = stop_token - table.cached_tokens
        limit = self._staging.capacity // WINDOWS_PER_STAGING
        window = self._staging.allocate(window_size(self._layout, tokens, source.tp, limit))
        if window is None:
            return None
        incoming = Incoming(
            transfer_id=transfer_id,
            epoch=self._epochs.next(),
            source=source,
            start_token=table.cached_tokens,
            stop_token=stop_token,
            pages=tuple(table.pages),
            window_offset=window.offset,
            window_bytes=window.size,
            lease_s=self._lease_s,
        )
        self._transfers[transfer_id] = _Transfer(window, incoming)
        return self._ticket(incoming)

    def expect(self, transfer_id: str) -> None:
        self._ranks.execute(OpenReceive(self._transfers[transfer_id].incoming))

    def close(self, transfer_id: str) -> None:
        self._verified.forget(transfer_id)
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            return  # it failed, and every rank has freed it since
        if transfer.landed:
            self._ranks.execute(CommitReceive(transfer_id))
        else:
            self._ranks.execute(AbortReceive(transfer_id, "the receiving engine gave the request up"))

    def poll(self) -> list[Landed | Lost]:
        reports = self._ranks.poll(Verified, ReceiveFailed, Freed)
        events = [self._take(rank, report) for rank, report in reports]
        return [event for event in events if event is not None]

    @property
    def staging(self) -> BytesUsed:
        return BytesUsed(self._staging.granted_bytes, self._staging.capacity)

    def _take(self, rank: int, report: object) -> Landed | Lost | None:
        match report:
            case Verified(transfer_id=transfer_id, hand_off=hand_off):
                transfer = self._transfers[transfer_id]
                transfer.hand_off = hand_off or transfer.hand_off
                if self._verified.add(transfer_id, rank) and transfer.hand_off is not None:
                    transfer.landed = True
                    return Landed(transfer_id, transfer.hand_off)
            case ReceiveFailed(transfer_id=transfer_id, reason=reason):
                return Lost(transfer_id, reason)
            case Freed(transfer_id=transfer_id):
                if self._freed.add(transfer_id, rank):
                    self._verified.forget(transfer_id)  # a rank's word may have come since it was closed
                    self._staging.release(self._transfers.pop(transfer_id).window)
        return None

    def _ticket(self, incoming: Incoming) -> Ticket:
        return Ticket(
            transfer_id=incoming.transfer_id,
            epoch=incoming.epoch,
            layout=self._layout,
            start_token=incoming.start_token,
            num_tokens=incoming.stop_token,
            lease_s=incoming.lease_s,
            endpoints=tuple(
                replace(endpoint, window_offset=incoming.window_offset, window_bytes=incoming.window_bytes)
                for endpoint in self._endpoints
            ),
        )
