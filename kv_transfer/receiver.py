"""The receiving side of KV transfers on one rank: the only writer of the pages that KV arrives in."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

from splitserve.cluster.channel import Pollable
from splitserve.cluster.errors import ProtocolError, TransferFailed
from splitserve.kernels.kv_pack import KvRegion
from splitserve.kv_transfer.checksum import bind
from splitserve.kv_transfer.lifecycle import TransferState
from splitserve.kv_transfer.mover import Mover
from splitserve.kv_transfer.protocol import (
    HAND_OFF_SEQUENCE,
    Freed,
    FromReceiver,
    FromSender,
    Incoming,
    KvAck,
    KvDrained,
    KvFinish,
    KvFrame,
    KvGone,
    KvNack,
    KvRenew,
    ReceiveFailed,
    ReceiverEvent,
    Verified,
    seal_all,
    unseal,
)
from splitserve.kv_transfer.reception import Landing, Reception, Share
from splitserve.kv_transfer.transport import Arrival, ReceiverTransport

MAX_MESSAGES = 8  # a turn: an engine has other things to do
LOOK_S = 0.01  # between looks at leases


class KvReceiver:
    """Moves arriving KV from staging into the pages of the mover's cache.

    A payload goes into pages only while its (transfer, epoch) is live and its header lies within what the source rank
    owes. It counts as landed only if its checksum holds on the words that were written; otherwise it comes again. So no
    message, however late, repeated or wrong, touches a page outside the reservation, nor any page of one that has
    ended, and no transfer is verified with a wrong word in its pages.

    Call `poll` from the engine's loop; nothing blocks, no thread runs. A transfer gives Verified, or ReceiveFailed;
    after `commit` or a failure, Freed returns its window. The lease runs until Verified: from then on the engine
    alone decides. `clock` gives seconds, monotonic.
    """

    def __init__(
        self,
        mover: Mover,
        rank: int,
        staging_bytes: int,
        transport: ReceiverTransport,
        clock: Callable[[], float],
    ) -> None:
        self._mover, self._rank, self._staging_bytes = mover, rank, staging_bytes
        self._transport, self._clock = transport, clock
        self._receptions: dict[str, Reception] = {}
        self._arrived: deque[tuple[Arrival, FromSender]] = deque()
        self._replies: defaultdict[bytes, list[FromReceiver]] = defaultdict(list)
        self._events: list[ReceiverEvent] = []
        self._newest_epoch = 0
        self._look_at = 0.0
        self.rejected = 0

    @property
    def sockets(self) -> list[Pollable]:
        """Where frames come in."""
        return self._transport.sockets

    @property
    def busy(self) -> bool:
        """Whether payloads are on their way, or a device writes them into pages, as `poll` last saw it."""
        landing = any(reception.landings for reception in self._receptions.values())
        return landing or bool(self._arrived) or self._transport.busy

    @property
    def resident(self) -> dict[str, TransferState]:
        """Transfers that still hold a window, and where they stand."""
        return {transfer_id: reception.lifecycle.state for transfer_id, reception in self._receptions.items()}

    def open(self, incoming: Incoming) -> None:
        """Await a transfer. Raises TransferFailed when its id, pages or window cannot be right."""
        if incoming.transfer_id in self._receptions:
            raise TransferFailed(f"transfer_id: {incoming.transfer_id} is open already")
        table = self._mover.table(incoming.pages, incoming.stop_token)
        mark, layout = self._mover.mark(), self._mover.cache.layout
        reception = Reception(incoming, layout, self._rank, table, mark, self._clock())
        window = reception.window
        if window.offset < 0 or window.size < 0 or window.end > self._staging_bytes:
            raise TransferFailed(f"window: found {window}; staging has {self._staging_bytes} bytes")
        for transfer_id, other in self._receptions.items():
            if window.overlaps(other.window):
                raise TransferFailed(f"window: {window} still belongs to {transfer_id}")
        self._receptions[incoming.transfer_id] = reception
        self._newest_epoch = max(self._newest_epoch, incoming.epoch)
        self._settle(reception)

    def poll(self, limit: int = MAX_MESSAGES) -> list[ReceiverEvent]:
        """Take up to `limit` messages and look at the clock. Returns what happened since last time.

        Between payloads that have landed it looks for others, so that a device has more to do meanwhile.
        """
        limit -= self._receive(limit)
        for reception in [each for each in self._receptions.values() if each.landings]:
            for landing in list(reception.landings.values()):
                if self._end_landing(reception, landing):
                    limit -= self._receive(limit)
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + LOOK_S
            for reception in list(self._receptions.values()):
                if now >= reception.expires and reception.lifecycle.awaits_sender:
                    self._abort(reception, f"no KV came for a lease of {reception.incoming.lease_s:g} s")
                self._free(reception, anyway=now >= reception.expires)
        self._answer()
        events, self._events = self._events, []
        return events

    def commit(self, transfer_id: str) -> None:
        """The pages now belong to the sequence. Raises TransferFailed unless the transfer is VERIFIED on this rank."""
        reception = self._receptions.get(transfer_id)
        if reception is None:
            raise TransferFailed(f"transfer_id: {transfer_id} is not open; only a verified transfer commits")
        reception.lifecycle.move(TransferState.COMMITTED)
        reception.renew(self._clock())
        self._free(reception)

    def abort(self, transfer_id: str, reason: str) -> None:
        """End a transfer that has not been committed; its pages may be given away at once. Ignored once it is over."""
        reception = self._receptions.get(transfer_id)
        if reception is not None and not reception.lifecycle.is_over:
            self._abort(reception, reason)
            self._answer()

    def close(self) -> None:
        """Tell all senders to stop, and close the transport."""
        for transfer_id in self._receptions:
            self.abort(transfer_id, "the receiver is shutting down")
        self._transport.close()

    def _receive(self, limit: int) -> int:
        """Take up to `limit` messages. Returns how many there were."""
        if limit > len(self._arrived):
            self._unpack_arrivals(limit - len(self._arrived))
        taken = [self._arrived.popleft() for _ in range(min(limit, len(self._arrived)))]
        for arrival, message in taken:
            self._take(arrival, message)
        self._mover.launch()
        return len(taken)

    def _unpack_arrivals(self, limit: int) -> None:
        """Look for up to `limit` parcels."""
        for arrival in self._transport.receive(limit):
            try:
                messages = unseal(arrival.header)
            except ProtocolError:
                self.rejected += 1
                continue
            for message in messages:
                if isinstance(message, FromSender):
                    self._arrived.append((arrival, message))
                else:
                    self.rejected += 1

    def _take(self, arrival: Arrival, message: FromSender) -> None:
        reception = self._receptions.get(message.transfer_id)
        if message.epoch > self._newest_epoch:
            self._put_off(arrival.peer, message)
        elif reception is None or reception.incoming.epoch != message.epoch:
            self._refuse(arrival.peer, message, "the receiver does not know this transfer (any more)")
        elif isinstance(message, KvDrained):
            self._on_drained(reception, message)
        elif reception.lifecycle.state is TransferState.ABORTING:
            self._refuse(arrival.peer, message, "the receiver has ended this transfer")
        else:
            if message.source_rank in reception.writers:
                reception.peers[message.source_rank] = arrival.peer
            self._on_live(reception, message, arrival)

    def _on_live(self, reception: Reception, message: KvFrame | KvFinish | KvRenew, arrival: Arrival) -> None:
        match message:
            case KvRenew():
                self._renew(reception)
            case KvFrame() if message.hand_off is None or self._takes_hand_off(message):
                share = reception.shares.get(message.source_rank)
                if share is None or message.target_rank != self._rank or not share.admits(message):
                    self.rejected += 1
                    return
                reception.hand_off = message.hand_off or reception.hand_off
                if share.has(message):
                    self._acknowledge(reception, arrival.peer, message.sequence)
                elif (message.source_rank, message.sequence) not in reception.landings:
                    self._land(reception, share, message, arrival)
            case KvFinish() if self._takes_hand_off(message):
                reception.hand_off = message.hand_off
                self._acknowledge(reception, arrival.peer, HAND_OFF_SEQUENCE)
                self._renew(reception)
            case KvFrame() | KvFinish():
                self.rejected += 1
        self._settle(reception)

    def _land(self, reception: Reception, share: Share, frame: KvFrame, arrival: Arrival) -> None:
        """Begin to write the frame's payload into pages."""
        try:
            payload = self._transport.take(arrival, frame.offset, share.size(frame))
        except TransferFailed:
            self._ask_again(arrival.peer, frame)
            return
        region = KvRegion(frame.layers, share.piece.target_heads, frame.tokens)
        mark, reception.mark = reception.mark, None
        move = self._mover.unpack(reception.table, region, payload, after=mark)
        landing = Landing(frame, share, arrival.peer, move)
        reception.landings[frame.source_rank, frame.sequence] = landing
        self._end_landing(reception, landing)

    def _end_landing(self, reception: Reception, landing: Landing) -> bool:
        """Check and acknowledge a frame, if all of it is written. Returns whether it is."""
        frame = landing.frame
        key = frame.source_rank, frame.sequence
        if reception.landings.get(key) is not landing or (total := landing.move.total()) is None:
            return False
        del reception.landings[key]
        if bind(total, frame.identity(), landing.share.size(frame)) == frame.checksum:
            landing.share.mark(frame)
            self._renew(reception)
            self._acknowledge(reception, landing.peer, frame.sequence)
            self._settle(reception)
        else:
            landing.share.spoil(frame)
            self._ask_again(landing.peer, frame)
        return True

    def _on_drained(self, reception: Reception, message: KvDrained) -> None:
        reception.writers.discard(message.source_rank)
        if reception.lifecycle.awaits_sender and reception.owes(message.source_rank):
            self._abort(reception, f"source rank {message.source_rank} stopped: {message.reason}")
        self._free(reception)

    def _settle(self, reception: Reception) -> None:
        """Move the transfer on by what has landed."""
        lifecycle = reception.lifecycle
        if lifecycle.state is TransferState.RESERVED and reception.has_begun:
            lifecycle.move(TransferState.SENDING)
        if lifecycle.state is TransferState.SENDING and reception.is_complete and not reception.landings:
            # Frames are checked one by one as they land, so the last one verifies all.
            lifecycle.move(TransferState.LANDED, TransferState.VERIFIED)
            self._events.append(Verified(reception.incoming.transfer_id, reception.hand_off))

    def _renew(self, reception: Reception) -> None:
        if reception.lifecycle.awaits_sender:
            reception.renew(self._clock())

    def _abort(self, reception: Reception, reason: str) -> None:
        self._mover.launch()
        for landing in reception.landings.values():
            landing.move.settle()
        reception.landings.clear()
        reception.lifecycle.move(TransferState.ABORTING)
        reception.renew(self._clock())
        incoming = reception.incoming
        for peer in reception.peers.values():
            self._send(peer, KvGone(incoming.transfer_id, incoming.epoch, reason))
        self._events.append(ReceiveFailed(incoming.transfer_id, reason))

    def _free(self, reception: Reception, *, anyway: bool = False) -> None:
        """Let go of a transfer that is over and that nobody writes the window of any more, or `anyway`."""
        if reception.lifecycle.is_over and (anyway or not reception.writers):
            reception.lifecycle.move(TransferState.DRAINED, TransferState.FREE)
            del self._receptions[reception.incoming.transfer_id]
            self._events.append(Freed(reception.incoming.transfer_id))

    def _put_off(self, peer: bytes, message: FromSender) -> None:
        """The sender has its ticket before this rank has heard of it from its leader: a frame is to come again."""
        if isinstance(message, KvFrame):
            self._ask_again(peer, message)

    def _refuse(self, peer: bytes, message: FromSender, reason: str) -> None:
        if not isinstance(message, KvDrained):
            self._send(peer, KvGone(message.transfer_id, message.epoch, reason))

    def _takes_hand_off(self, message: KvFrame | KvFinish) -> bool:
        return self._rank == 0 and message.source_rank == 0

    def _acknowledge(self, reception: Reception, peer: bytes, sequence: int) -> None:
        incoming = reception.incoming
        self._send(peer, KvAck(incoming.transfer_id, incoming.epoch, sequence, reception.hand_off is not None))

    def _ask_again(self, peer: bytes, frame: KvFrame) -> None:
        self._send(peer, KvNack(frame.transfer_id, frame.epoch, frame.sequence))

    def _send(self, peer: bytes, message: FromReceiver) -> None:
        """Put it with what else this turn has for that peer."""
        self._replies[peer].append(message)

    def _answer(self) -> None:
        for peer, messages in self._replies.items():
            for parcel in seal_all(messages):
                self._transport.send(peer, parcel)
        self._replies.clear()
