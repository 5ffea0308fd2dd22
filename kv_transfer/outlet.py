"""Where an engine's KV goes: over the wire to another engine, or, colocated, nowhere at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from splitserve.cluster.channel import Pollable
from splitserve.cluster.codec import message
from splitserve.cluster.counts import TransferCounts
from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.messages import HandOff, Prefill, SendPrefix, Ticket, transfer_id_of
from splitserve.engine.batch import Batch
from splitserve.engine.block_manager import BlockManager, BlockTable
from splitserve.engine.ranks import Agreement, Handlers, Ranks
from splitserve.engine.runner import ModelRunner
from splitserve.kv_transfer.mover import Mark
from splitserve.kv_transfer.protocol import SendFailed
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.traffic import total


@dataclass(frozen=True)
class Delivered:
    """The transfer is over on the prefill side; `error` says why it failed, if it did."""

    transfer_id: str
    error: str | None


class KvOutlet(Protocol):
    """What the prefill engine needs to know of the way that KV takes."""

    def open(self, request: Prefill, ticket: Ticket | None) -> BlockTable | None:
        """Pages to compute the prompt's KV into; None when there is no room now.

        Raises TransferFailed when the reservation is good no more.
        """

    def send_to(self, ticket: Ticket) -> None:
        """Where the KV goes of a transfer that was opened before decode had granted it."""

    def run_command(self, batch: Batch, written: Sequence[tuple[str, int]]) -> object:
        """The command that runs `batch`, after which each (transfer, stop token) of `written` is in its pages."""

    def finish(self, transfer_id: str, hand_off: HandOff) -> None:
        """The whole prompt is computed and the first tokens are known. `Delivered` follows from `poll`."""

    def keep(self, tickets: Sequence[Ticket]) -> None:
        """These transfers wait for their turn: keep their reservations alive."""

    def decline(self, ticket: Ticket, reason: str) -> None:
        """Give up a transfer that was never opened."""

    def lend(self, prefix: SendPrefix) -> None:
        """Send pages that are cached to another engine, or decline where they are not (any more)."""

    def abort(self, transfer_id: str, reason: str) -> None:
        """Give up a transfer that was opened. Its pages are free at once; nothing follows from `poll`."""

    def poll(self) -> list[Delivered]: ...

    @property
    def traffic(self) -> SendTraffic:
        """What all ranks have sent so far."""


@message
@dataclass(frozen=True)
class RenewSends:
    tickets: tuple[Ticket, ...]


@message
@dataclass(frozen=True)
class DeclineSend:
    ticket: Ticket
    reason: str


@message
@dataclass(frozen=True)
class BeginSend:
    ticket: Ticket
    pages: list[int]
    cached_tokens: int


@message
@dataclass(frozen=True)
class RunAndSend:
    """Run the model and send, layer by layer, what it writes: each (transfer, stop token) of `written`.

    Transfers that `begin` with this batch do so once the device has work: it is not kept waiting for them. What is
    written of those that are `waiting` for their tickets is sent once they begin.
    """

    batch: Batch
    begin: tuple[BeginSend, ...]
    written: tuple[tuple[str, int], ...]
    waiting: tuple[str, ...]


@message
@dataclass(frozen=True)
class FinishSend:
    transfer_id: str
    hand_off: HandOff


@message
@dataclass(frozen=True)
class AbortSend:
    transfer_id: str
    reason: str


@message
@dataclass(frozen=True)
class SendOver:
    """A rank's report: all of its KV is with the decode side, or never will be (`error`)."""

    transfer_id: str
    error: str | None


@message
@dataclass(frozen=True)
class SendTraffic:
    """A rank's report: all that it has sent so far. It comes when a transfer has ended, or a link came or went."""

    transfers: tuple[TransferCounts, ...]
    links_up: int


NO_TRAFFIC = SendTraffic((), 0)


class SendService:
    """A sending rank's part of every transfer."""

    def __init__(self, runner: ModelRunner, sender: KvSender) -> None:
        self._runner, self._sender = runner, sender
        self._written: dict[str, list[tuple[int, range, Mark]]] = {}  # of transfers that wait for their tickets
        self._reports: list[object] = []
        self._reported = (0, 0)
        self.handlers: Handlers = {
            RenewSends: self._renew,
            DeclineSend: lambda command: sender.decline(command.ticket, command.reason),
            RunAndSend: self._run,
            FinishSend: lambda command: sender.finish(command.transfer_id, command.hand_off),
            BeginSend: self._begin,
            AbortSend: self._abort,
        }

    @property
    def sockets(self) -> list[Pollable]:
        return self._sender.sockets

    @property
    def busy(self) -> bool:
        return self._sender.busy

    def poll(self) -> list[object]:
        self._pump()
        now = self._sender.traffic.ended, self._sender.links_up
        if now != self._reported:
            self._reported = now
            self._reports.append(SendTraffic(self._sender.traffic.counts(), self._sender.links_up))
        reports, self._reports = self._reports, []
        return reports

    def _renew(self, command: RenewSends) -> None:
        for ticket in command.tickets:
            self._sender.renew(ticket)

    def _begin(self, command: BeginSend) -> None:
        ticket = command.ticket
        try:
            self._sender.begin(ticket, command.pages)
        except TransferFailed as error:
            self._sender.decline(ticket, str(error))
            self._reports.append(SendOver(ticket.transfer_id, str(error)))
            return
        self._sender.ready([(ticket.transfer_id, command.cached_tokens)], range(ticket.layout.num_layers))
        for stop_token, layers, mark in self._written.pop(ticket.transfer_id, ()):
            self._sender.ready([(ticket.transfer_id, stop_token)], layers, mark)

    def _abort(self, command: AbortSend) -> None:
        self._written.pop(command.transfer_id, None)
        self._sender.abort(command.transfer_id, command.reason)

    def _run(self, command: RunAndSend) -> object:
        begin = list(command.begin)

        def layers_written(layers: range) -> None:
            while begin:
                self._begin(begin.pop(0))
            self._note(command, layers)
            self._pump()

        return self._runner.run(command.batch, layers_written)

    def _note(self, command: RunAndSend, layers: range) -> None:
        """Tell the sender what is written, or remember it until the transfer begins."""
        mark = self._sender.mark()
        self._sender.ready(command.written, layers, mark)
        for transfer_id, stop_token in command.written:
            if transfer_id in command.waiting:
                self._written.setdefault(transfer_id, []).append((stop_token, layers, mark))

    def _pump(self) -> None:
        for event in self._sender.pump():
            self._reports.append(SendOver(event.transfer_id, event.reason if isinstance(event, SendFailed) else None))


@dataclass
class _Transfer:
    """Begins when its `ticket` is there and a batch is launched that has `written` to its pages, both.

    `hand_off` waits for the ticket.
    """

    table: BlockTable
    ticket: Ticket | None
    written: bool = False
    hand_off: HandOff | None = None

    def begin(self, ticket: Ticket) -> BeginSend:
        return BeginSend(ticket, self.table.pages, self.table.cached_tokens)


class SendOutlet:
    """KV goes to other engines. Pages come from the engine's own cache and stay until all is sent."""

    def __init__(self, ranks: Ranks, blocks: BlockManager) -> None:
        self._ranks, self._blocks = ranks, blocks
        self._transfers: dict[str, _Transfer] = {}
        self._agreement = Agreement(ranks.size)
        self._traffic: dict[int, SendTraffic] = {}

    def open(self, request: Prefill, ticket: Ticket | None) -> BlockTable | None:
        # Prompt log probabilities need the logits of every position, so nothing may come from the cache.
        reuse = None if request.params.prompt_logprobs is None else 0
        table = self._blocks.allocate(request.token_ids, request.extra_keys, max_cached_tokens=reuse)
        if table is not None:
            self._transfers[transfer_id_of(request.request_id, request.attempt)] = _Transfer(table, ticket)
        return table

    def send_to(self, ticket: Ticket) -> None:
        transfer = self._transfers[ticket.transfer_id]
        transfer.ticket = ticket
        if transfer.written:
            self._ranks.execute(transfer.begin(ticket))
        if transfer.hand_off is not None:
            self.finish(ticket.transfer_id, transfer.hand_off)

    def run_command(self, batch: Batch, written: Sequence[tuple[str, int]]) -> object:
        begin = []
        for transfer in (self._transfers[transfer_id] for transfer_id, _ in written):
            if not transfer.written and transfer.ticket is not None:
                begin.append(transfer.begin(transfer.ticket))
            transfer.written = True
        waiting = tuple(transfer_id for transfer_id, _ in written if self._transfers[transfer_id].ticket is None)
        return RunAndSend(batch, tuple(begin), tuple(written), waiting)

    def finish(self, transfer_id: str, hand_off: HandOff) -> None:
        transfer = self._transfers[transfer_id]
        if transfer.ticket is None:
            transfer.hand_off = hand_off
        else:
            self._ranks.execute(FinishSend(transfer_id, hand_off))

    def keep(self, tickets: Sequence[Ticket]) -> None:
        opened = (transfer.ticket for transfer in self._transfers.values() if not transfer.written)
        if all_tickets := (*tickets, *filter(None, opened)):
            self._ranks.execute(RenewSends(all_tickets))

    def decline(self, ticket: Ticket, reason: str) -> None:
        self._ranks.execute(DeclineSend(ticket, reason))

    def lend(self, prefix: SendPrefix) -> None:
        ticket, tokens = prefix.ticket, prefix.ticket.num_tokens
        table = None
        if 0 < tokens < len(prefix.token_ids) and ticket.transfer_id not in self._transfers:
            table = self._blocks.allocate(prefix.token_ids[: tokens + 1], prefix.extra_keys)
        if table is not None and table.cached_tokens == tokens:
            self._transfers[ticket.transfer_id] = transfer = _Transfer(table, ticket, written=True)
            self._ranks.execute(transfer.begin(ticket))
            self.finish(ticket.transfer_id, HandOff(()))
            return
        if table is not None:
            self._blocks.free(table)
        self.decline(ticket, "that prefix is not cached (any more)")

    def abort(self, transfer_id: str, reason: str) -> None:
        transfer = self._transfers[transfer_id]
        if transfer.written:
            self._ranks.execute(AbortSend(transfer_id, reason))
        elif transfer.ticket is not None:
            self.decline(transfer.ticket, reason)
        self._close(transfer_id)

    def poll(self) -> list[Delivered]:
        delivered = []
        for rank, report in self._ranks.poll(SendTraffic, SendOver):
            if isinstance(report, SendTraffic):
                self._traffic[rank] = report
            elif report.transfer_id not in self._transfers:
                continue
            elif report.error is not None:
                self.abort(report.transfer_id, report.error)
                delivered.append(Delivered(report.transfer_id, report.error))
            elif self._agreement.add(report.transfer_id, rank):
                self._close(report.transfer_id)
                delivered.append(Delivered(report.transfer_id, None))
        return delivered

    @property
    def traffic(self) -> SendTraffic:
        ranks = self._traffic.values()
        return SendTraffic(total(one for rank in ranks for one in rank.transfers), sum(rank.links_up for rank in ranks))

    def _close(self, transfer_id: str) -> None:
        self._agreement.forget(transfer_id)
        self._blocks.free(self._transfers.pop(transfer_id).table)
