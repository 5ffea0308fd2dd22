"""The sending side of KV transfers on one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Literal

from splitserve.cluster.channel import Pollable
from splitserve.cluster.errors import ProtocolError, TransferFailed
from splitserve.cluster.messages import HandOff, RankEndpoint, Ticket
from splitserve.kernels.kv_pack import KvRegion
from splitserve.kv_transfer.checksum import bind
from splitserve.kv_transfer.mover import Mark, Mover
from splitserve.kv_transfer.outgoing import Flight, Outgoing, build_lanes
from splitserve.kv_transfer.protocol import (
    FromReceiver,
    FromSender,
    KvAck,
    KvDrained,
    KvFinish,
    KvFrame,
    KvGone,
    KvNack,
    KvRenew,
    SenderEvent,
    SendFailed,
    Sent,
    seal,
    seal_all,
    unseal,
)
from splitserve.kv_transfer.traffic import Traffic
from splitserve.kv_transfer.transport import SenderTransport

TRIES_PER_LEASE = 8
SMALL_BYTES = 8 << 20  # payloads of which share a message; others' frames are on their way at once
MOST_PACKED = 16  # frames a turn: those of before are sent between, and the engine has its turn


class KvSender:
    """Sends this rank's share of each transfer from its pages, as fast as its window and the peer allow.

    Call `pump` from the engine's loop; nothing else sends, nothing blocks, no thread runs. A transfer ends with one
    event: Sent, or SendFailed when the receiver let go, could not be reached, or left what is on its way unacknowledged
    for a lease. Calls about a transfer that is over are ignored: its event may still be on its way. The pages
    belong to the transfer until then. `clock` gives seconds, monotonic.
    """

    def __init__(self, mover: Mover, rank: int, transport: SenderTransport, clock: Callable[[], float]) -> None:
        self._mover, self._rank, self._transport, self._clock = mover, rank, transport, clock
        self._outgoing: dict[str, Outgoing] = {}
        self._stopping: list[tuple[Outgoing, str]] = []
        self._outbox: dict[tuple[str, str], tuple[RankEndpoint, list[FromSender]]] = {}
        self._may_pack = MOST_PACKED
        self._events: list[SenderEvent] = []
        self.traffic = Traffic()
        self.rejected = 0

    @property
    def sockets(self) -> list[Pollable]:
        """Where acknowledgements come in."""
        return self._transport.sockets

    @property
    def busy(self) -> bool:
        """Whether a device computes or packs KV, as `pump` last saw it, or more is left than it packs in a turn."""
        under_way = any(outgoing.is_under_way for outgoing in self._outgoing.values())
        return under_way or bool(self._stopping) or not self._may_pack

    @property
    def active(self) -> tuple[str, ...]:
        """Transfers that have not ended."""
        return tuple(self._outgoing)

    @property
    def links_up(self) -> int:
        """NCCL communicators that are up."""
        return self._transport.links_up

    def begin(self, ticket: Ticket, pages: Sequence[int]) -> None:
        """Start the transfer of `ticket` from `pages`, which cover the sequence from its first token on.

        Raises TransferFailed when the ticket or the pages cannot be right, or a target cannot be reached.
        """
        if ticket.transfer_id in self._outgoing:
            raise TransferFailed(f"transfer_id: {ticket.transfer_id} is being sent already")
        now = self._clock()
        outgoing = Outgoing(
            ticket=ticket,
            table=self._mover.table(pages, ticket.num_tokens),
            lanes=build_lanes(ticket, self._mover.cache.layout, self._rank, self._transport.frame_sizes),
            transport=self._transport.way(ticket.endpoints[0]),
            ready=[ticket.start_token] * self._mover.cache.layout.num_layers,
            marks=[None] * self._mover.cache.layout.num_layers,
            owes_hand_off=self._rank == 0,
            expires=now + ticket.lease_s,
            beat_at=now + ticket.lease_s / TRIES_PER_LEASE,
            rests_until=now,
        )
        for target in outgoing.targets(self._rank):
            self._transport.connect(target)
        self._outgoing[ticket.transfer_id] = outgoing
        self.traffic.count(outgoing.transport, "started")

    def renew(self, ticket: Ticket) -> None:
        """Keep the reservation of a ticket that `begin` has not seen yet: its lease starts anew."""
        self._tell(ticket, KvRenew(ticket.transfer_id, ticket.epoch, self._rank))

    def decline(self, ticket: Ticket, reason: str) -> None:
        """Give up a ticket that `begin` has not seen: this rank will send nothing."""
        self._tell(ticket, KvDrained(ticket.transfer_id, ticket.epoch, self._rank, reason))

    def mark(self) -> Mark:
        """What the engine has launched up to now."""
        return self._mover.mark()

    def ready(self, written: Iterable[tuple[str, int]], layers: Sequence[int], mark: Mark = None) -> None:
        """Each (transfer, stop token) of `written`: the KV of `layers` before it is in the pages, or launched to be.

        Launched until `mark`, or until now.
        """
        mark = mark or self.mark()
        for transfer_id, stop_token in written:
            if (outgoing := self._outgoing.get(transfer_id)) is not None:
                for layer in layers:
                    if stop_token > outgoing.ready[layer]:
                        outgoing.ready[layer], outgoing.marks[layer] = stop_token, mark
                self._progress(outgoing)

    def finish(self, transfer_id: str, hand_off: HandOff) -> None:
        """Hand over what decode goes on from. Rank 0 owes it for every transfer; other ranks have none.

        It travels with frames where some are still to leave: all of a small prompt is one message.
        """
        outgoing = self._outgoing.get(transfer_id)
        if outgoing is not None:
            outgoing.hand_off = hand_off
            if not outgoing.has_more_to_send:
                outgoing.beat_at = self._clock()
            self._progress(outgoing)

    def abort(self, transfer_id: str, reason: str) -> None:
        """Stop, and tell the receiver when nothing writes there any more. No event follows; the pages are free."""
        if (outgoing := self._outgoing.get(transfer_id)) is not None:
            self._stop(outgoing, reason, "cancelled")
            self._flush()

    def pump(self) -> list[SenderEvent]:
        """Take acknowledgements, send what is ready, send again what is overdue. Returns what ended since last time."""
        for header in self._transport.receive():
            self._take_replies(header)
        now, self._may_pack = self._clock(), MOST_PACKED
        for outgoing in [each for each in self._outgoing.values() if now >= each.rests_until]:
            try:
                self._advance(outgoing)
            except TransferFailed as error:
                self._fail(outgoing, str(error))
        self._mover.launch()
        self._end_stopped()
        self._flush()
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Stop everything, as `abort` would, and close the transport."""
        for transfer_id in self.active:
            self.abort(transfer_id, "the sender is shutting down")
        self._transport.close()

    def _advance(self, outgoing: Outgoing) -> None:
        now = self._clock()
        if not outgoing.awaits_receiver:
            self._progress(outgoing)
        if outgoing.is_complete:
            self._outgoing.pop(outgoing.ticket.transfer_id)
            self._say_drained(outgoing, "")
            self.traffic.count(outgoing.transport, "completed")
            self._events.append(Sent(outgoing.ticket.transfer_id))
        elif now >= outgoing.expires:
            raise TransferFailed(f"no progress for a lease of {outgoing.ticket.lease_s:g} s")
        else:
            for flight in chain(list(outgoing.flights.values()), self._cut(outgoing, now)):
                if self._mover.passed(flight.written):
                    flight.written = None
                    if flight.move is None and now >= flight.due and self._may_pack:
                        self._pack(outgoing, flight)
                        self._send_packed(outgoing)
            self._send_packed(outgoing)
            if now >= outgoing.beat_at:
                self._beat(outgoing, now)
            if self._may_pack and not outgoing.is_under_way:
                outgoing.rest()

    def _cut(self, outgoing: Outgoing, now: float) -> Iterator[Flight]:
        """Make frames of all that is ready and finds a free slot, one when it is asked for: the first is on its way."""
        ticket = outgoing.ticket
        for lane in outgoing.lanes:
            while self._may_pack and (region := lane.take(outgoing.ready)) is not None:
                outgoing.sequence += 1
                frame = KvFrame(
                    transfer_id=ticket.transfer_id,
                    epoch=ticket.epoch,
                    source_rank=self._rank,
                    target_rank=lane.piece.target_rank,
                    sequence=outgoing.sequence,
                    layers=region.layers,
                    tokens=region.tokens,
                    offset=lane.free_slots.pop(0),
                    checksum=0,
                )
                flight = Flight(frame, lane, now, outgoing.marks[frame.layers[1] - 1])
                outgoing.flights[frame.sequence] = flight
                yield flight

    def _pack(self, outgoing: Outgoing, flight: Flight) -> None:
        """Pack a frame, anew each time it is sent: the pages keep its content, so that no copy has to wait."""
        frame, lane = flight.frame, flight.lane
        region = KvRegion(frame.layers, lane.piece.source_heads, frame.tokens)
        size = lane.token_bytes * (frame.layers[1] - frame.layers[0]) * (frame.tokens[1] - frame.tokens[0])
        flight.payload = self._transport.place(lane.target, frame.offset, size)
        if flight.payload is None:
            return
        self._may_pack -= 1
        self.traffic.count(self._transport.way(lane.target), "bytes", size)
        flight.due = self._clock() + outgoing.ticket.lease_s / TRIES_PER_LEASE
        flight.move = self._mover.pack(outgoing.table, region, flight.payload)

    def _send_packed(self, outgoing: Outgoing) -> None:
        """Send frames whose payloads are whole: while others are packed, for a receiver that waits for the first one.

        Those that have landed in the meantime are done with.
        """
        for flight in list(outgoing.flights.values()):
            if flight.move is None or flight.payload is None or (total := flight.move.total()) is None:
                continue
            payload, flight.payload, flight.move = flight.payload, None, None
            if flight.landed:
                self._land(outgoing, flight)
                continue
            checksum = bind(total, flight.frame.identity(), payload.numel())
            hand_off = outgoing.hand_off if outgoing.owes_hand_off and flight.lane.piece.target_rank == 0 else None
            frame = replace(flight.frame, checksum=checksum, hand_off=hand_off)
            if payload.numel() < SMALL_BYTES and self._transport.reaches(flight.lane.target):
                self._send(flight.lane.target, frame)
            else:
                self._transport.send(flight.lane.target, seal(frame), payload, frame.offset)

    def _land(self, outgoing: Outgoing, flight: Flight) -> None:
        """The receiver has the frame: its slot is free again."""
        del outgoing.flights[flight.frame.sequence]
        flight.lane.free_slots.append(flight.frame.offset)
        self._progress(outgoing)

    def _beat(self, outgoing: Outgoing, now: float) -> None:
        """Renew the lease at all targets: at the one that is owed the hand-off, by that, until it is acknowledged."""
        ticket = outgoing.ticket
        outgoing.beat_at = now + ticket.lease_s / TRIES_PER_LEASE
        for target in outgoing.targets(self._rank):
            if target == ticket.endpoints[0] and outgoing.owes_hand_off and outgoing.hand_off is not None:
                self._send(target, KvFinish(ticket.transfer_id, ticket.epoch, self._rank, outgoing.hand_off))
            else:
                self._send(target, KvRenew(ticket.transfer_id, ticket.epoch, self._rank))

    def _take_replies(self, header: bytes) -> None:
        try:
            replies = unseal(header)
        except ProtocolError:
            self.rejected += 1
            return
        for reply in replies:
            if isinstance(reply, FromReceiver):
                self._take_reply(reply)
            else:
                self.rejected += 1

    def _take_reply(self, reply: FromReceiver) -> None:
        outgoing = self._outgoing.get(reply.transfer_id)
        if outgoing is None or outgoing.ticket.epoch != reply.epoch:
            return
        match reply:
            case KvGone():
                self._fail(outgoing, reply.reason)
            case KvNack() if reply.sequence in outgoing.flights:
                outgoing.flights[reply.sequence].due = outgoing.rests_until = self._clock()
            case KvAck():
                self._on_acknowledged(outgoing, reply)

    def _on_acknowledged(self, outgoing: Outgoing, reply: KvAck) -> None:
        if reply.hand_off and outgoing.owes_hand_off:
            outgoing.owes_hand_off = False
            self._progress(outgoing)
        if (flight := outgoing.flights.get(reply.sequence)) is not None:
            flight.landed = True
            if flight.move is None:
                self._land(outgoing, flight)

    def _stop(self, outgoing: Outgoing, reason: str, how: Literal["cancelled", "failed"]) -> None:
        self._outgoing.pop(outgoing.ticket.transfer_id, None)
        self.traffic.count(outgoing.transport, how)
        self._stopping.append((outgoing, reason))
        self._end_stopped()

    def _fail(self, outgoing: Outgoing, reason: str) -> None:
        self._stop(outgoing, reason, "failed")
        self._events.append(SendFailed(outgoing.ticket.transfer_id, reason))

    def _end_stopped(self) -> None:
        """Tell the receivers of stopped transfers that this rank writes no more, where that is so."""
        stopping, self._stopping = self._stopping, []
        for outgoing, reason in stopping:
            if outgoing.is_packing:
                self._stopping.append((outgoing, reason))
            else:
                self._say_drained(outgoing, reason)

    def _say_drained(self, outgoing: Outgoing, reason: str) -> None:
        for target in outgoing.targets(self._rank):
            self._send(target, KvDrained(outgoing.ticket.transfer_id, outgoing.ticket.epoch, self._rank, reason))

    def _tell(self, ticket: Ticket, message: FromSender) -> None:
        for target in ticket.endpoints:
            self._send(target, message)
        self._flush()

    def _send(self, target: RankEndpoint, message: FromSender) -> None:
        """Put it with what else this turn has for that target."""
        _, messages = self._outbox.setdefault((target.address, target.segment), (target, []))
        messages.append(message)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for target, messages in outbox.values():
            # A target whose address is no good hears nothing, and its lease runs out.
            with contextlib.suppress(TransferFailed):
                for parcel in seal_all(messages):
                    self._transport.send(target, parcel)

    def _progress(self, outgoing: Outgoing) -> None:
        outgoing.rests_until = now = self._clock()
        outgoing.expires = now + outgoing.ticket.lease_s
