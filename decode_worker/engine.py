"""The decode engine: reservations in, one token a step for every running sequence out.

Reserve -> reserved --KV landed--> ready --slot--> running --stop, length--> gone
              |                      |              |    ^
              |                      |        no page    room again
              |                      |              v    |
              |                      +--no page-> parked (host tier)
              +----------------------+--- cancel, deadline, loss ---> gone, pages freed
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from splitserve.cluster.channel import Pollable
from splitserve.cluster.counts import EngineCounts
from splitserve.cluster.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailure,
    Overloaded,
    SplitserveError,
    TransferFailed,
)
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import (
    Busy,
    Cancel,
    EngineSpeed,
    EngineStats,
    Failed,
    Granted,
    HandOff,
    Joined,
    PrefixUpdate,
    Reserve,
    SampleToken,
    SendPrefix,
    StepTokens,
)
from splitserve.decode_worker.decode_request import DecodeRequest, attempt_id
from splitserve.decode_worker.slots import Slots
from splitserve.decode_worker.steps import Outcome, Steps
from splitserve.engine.block_manager import BlockManager, BlockTable
from splitserve.engine.grammar import Grammars, GrammarState, wait_for_mask
from splitserve.engine.pace import StepTime
from splitserve.engine.ranks import CopyPages, Ranks
from splitserve.engine.sequence import ModelLimits, Sequence
from splitserve.engine.serving import Send
from splitserve.kv_transfer.inlet import KvInlet, Landed, Lost
from splitserve.kv_transfer.outlet import SendOutlet

log = logging.getLogger(__name__)

BUSY_RETRY_S = 0.05


@dataclass(frozen=True)
class DecodeLimits:
    """`slots`: sequences decoded at once; `max_sequences`: reserved, waiting and running ones together."""

    slots: int
    max_sequences: int
    model: ModelLimits


class DecodeEngine:
    """Scheduler and state of one decode engine; single-threaded. By `lender` it sends what it has cached to others."""

    def __init__(
        self,
        name: str,
        incarnation: str,
        ranks: Ranks,
        steps: Steps,
        blocks: BlockManager,
        layout: KvLayout,
        inlet: KvInlet,
        limits: DecodeLimits,
        grammars: Grammars,
        send: Send,
        clock: Callable[[], float] = time.monotonic,
        lender: SendOutlet | None = None,
    ) -> None:
        self._name, self._incarnation, self._layout = name, incarnation, layout
        self._ranks, self._steps, self._blocks, self._inlet = ranks, steps, blocks, inlet
        self._limits, self._grammars, self._send, self._clock = limits, grammars, send, clock
        self._lender = lender
        self._requests: dict[str, DecodeRequest] = {}
        self._slots = Slots(blocks, limits.slots)
        self._step_time = StepTime(clock)
        self._counts: Counter[str] = Counter()

    def handle(self, router: bytes, item: object) -> None:
        match item:
            case Reserve():
                self._reserve(router, item)
            case Cancel():
                self._cancel(router, item)
            case SendPrefix() if self._lender is not None:
                self._lender.lend(item)
            case _:
                log.warning("a decode engine takes no %s", type(item).__name__)

    def step(self) -> bool:
        """Let landed requests join, give every running sequence room, run the model once, send the new tokens."""
        self._settle_transfers()
        if self._lender is not None:
            self._lender.poll()
        self._fail_unmasked()
        late = self._without_mask()
        self._step_time.began()
        launched = self._steps.has_room and self._steps.launch(self._slots.schedule())
        self._counts["decode_steps"] += launched
        outcomes = self._steps.results()
        if outcomes:
            self._step_time.ended()
        self._advance(outcomes)
        if launched or outcomes or self._steps.under_way:
            return True
        if late:
            wait_for_mask(late)
            return True
        self._step_time.rested()
        self._fail_deadlocked()
        return self._ranks.busy

    @property
    def sockets(self) -> list[Pollable]:
        return self._ranks.sockets

    @property
    def idle(self) -> bool:
        return not (self._requests or self._steps.under_way)

    def forget(self, router: bytes) -> None:
        for request in list(self._requests.values()):
            if request.router == router:
                self._drop(request)

    def expire(self) -> None:
        now = self._clock()
        for request in list(self._requests.values()):
            if now - request.arrived > request.message.deadline_s:
                self._fail(request, DeadlineExceeded("the deadline passed during decode"))

    def stats(self) -> EngineStats:
        return EngineStats(
            engine=self._name,
            incarnation=self._incarnation,
            role="decode",
            layout=self._layout,
            running=self._slots.running,
            waiting=self._slots.waiting + sum(not request.joined for request in self._requests.values()),
            free_tokens=self._blocks.free_pages * self._blocks.page_size,
            total_tokens=self._blocks.num_pages * self._blocks.page_size,
            preemptions=self._slots.preemptions,
            slots=self._limits.slots,
            host_tier=self._blocks.host_bytes(self._layout.bytes_per_page),
            staging=self._inlet.staging,
            counts=EngineCounts(**self._counts),
            transfers=() if self._lender is None else self._lender.traffic.transfers,
            links_up=0,
            speed=EngineSpeed(step_s=self._step_time.seconds if self._slots.running else 0.0),
        )

    def prefix_update(self, since: int) -> PrefixUpdate | None:
        return self._blocks.prefixes.update(self._name, self._incarnation, since)

    def _reserve(self, router: bytes, item: Reserve) -> None:
        try:
            self._check(item)
        except SplitserveError as error:
            self._send(router, Failed(item.request_id, item.attempt, error.code, str(error)))
            return
        granted = self._grant(router, item)
        self._send(router, granted or Busy(item.request_id, item.attempt, BUSY_RETRY_S))
        if granted:
            self._inlet.expect(granted.ticket.transfer_id)

    def _check(self, item: Reserve) -> None:
        self._limits.model.check(item)
        if attempt_id(item) in self._requests:
            raise InvalidRequest("request_id", item.request_id, "this attempt is under way already")
        room = min(self._limits.max_sequences, self._blocks.num_pages - self._blocks.pages_for(len(item.token_ids)) + 1)
        if item.params.n > room:
            raise InvalidRequest("n", item.params.n, f"this decode engine takes at most {room} with this prompt")

    def _grant(self, router: bytes, item: Reserve) -> Granted | None:
        sequences = sum(request.message.params.n for request in self._requests.values())
        if sequences + item.params.n > self._limits.max_sequences or self._slots.preempted:
            return None
        tables = self._allocate(item)
        if tables is None and self._slots.make_room(self._pages_for(item)):
            tables = self._allocate(item)
        if tables is None:
            return None
        request = DecodeRequest(router, item, *tables, arrived=self._clock())
        ticket = self._inlet.open(request.transfer_id, item.source, request.tables[0], len(item.token_ids))
        if ticket is None:
            self._free_tables(request)
            return None
        self._requests[request.transfer_id] = request
        if item.params.prompt_logprobs is None:
            self._counts["queried_tokens"] += len(item.token_ids)
            self._counts["cached_tokens"] += ticket.start_token
        return Granted(item.request_id, item.attempt, ticket)

    def _pages_for(self, item: Reserve) -> int:
        """Pages of a newcomer, and one for every sequence that runs: else its own would be taken from it at once."""
        return self._blocks.pages_for(len(item.token_ids)) + item.params.n - 1 + self._slots.running

    def _allocate(self, item: Reserve) -> tuple[list[BlockTable], list[tuple[int, int]]] | None:
        """A table for every sample, and the pages to copy once the KV is there; None when there is no room.

        Samples share the prompt's full pages; only a part-filled last page is each one's own.
        """
        reuse = None if item.params.prompt_logprobs is None else 0
        table = self._blocks.allocate(item.token_ids, item.extra_keys, max_cached_tokens=reuse)
        if table is None:
            return None
        tables, copies = [table], []
        for _ in range(1, item.params.n):
            forked = self._blocks.fork(table, len(item.token_ids))
            if forked is None:
                for taken in tables:
                    self._blocks.free(taken)
                return None
            tables.append(forked[0])
            copies += forked[1]
        if self._blocks.free_pages >= self._slots.running:
            return tables, copies
        for taken in tables:
            self._blocks.free(taken)
        return None

    def _settle_transfers(self) -> None:
        for event in self._inlet.poll():
            request = self._requests.get(event.transfer_id)
            if request is None or request.joined:
                continue
            match event:
                case Landed(hand_off=hand_off):
                    self._join(request, hand_off)
                case Lost(reason=reason):
                    self._fail(request, TransferFailed(reason))

    def _join(self, request: DecodeRequest, hand_off: HandOff) -> None:
        message = request.message
        if len(hand_off.first_tokens) != message.params.n:
            self._fail(
                request, TransferFailed(f"{len(hand_off.first_tokens)} first tokens, expected {message.params.n}")
            )
            return
        self._inlet.close(request.transfer_id)
        request.joined = True
        self._blocks.publish(request.tables[0], message.token_ids, len(message.token_ids))
        if request.copies:
            self._ranks.execute(CopyPages(tuple(request.copies)))
        self._send(request.router, Joined(message.request_id, message.attempt))
        request.sequences = [Sequence.of(message, index, self._limits.model) for index in range(message.params.n)]
        for sequence, table, first in zip(list(request.sequences), request.tables, hand_off.first_tokens, strict=True):
            self._start(request, sequence, table, first)

    def _start(self, request: DecodeRequest, sequence: Sequence, table: BlockTable, first_token: int) -> None:
        sequence.table = table
        sequence.computed_tokens = len(sequence.token_ids)
        self._slots.add(sequence)
        if sequence.take(first_token).finish_reason is not None or sequence.sample in request.cancelled:
            self._end(request, sequence)
        else:
            sequence.constrain(self._grammars)

    def _advance(self, outcomes: list[Outcome]) -> None:
        outgoing: dict[bytes, list[SampleToken]] = {}
        for sequence, chosen in outcomes:
            request = self._requests.get(attempt_id(sequence))
            if request is None or sequence not in request.sequences:
                continue  # it ended while this step was under way, or through another of its samples
            if chosen is None:
                self._fail(request, ModelFailure("the model's logits are not finite"))
                continue
            sequence.computed_tokens = len(sequence.token_ids)
            self._counts["output_tokens"] += 1
            outgoing.setdefault(request.router, []).append(sequence.take(chosen.token_id, chosen.logprobs))
            assert sequence.table is not None
            self._blocks.publish(sequence.table, sequence.token_ids, sequence.computed_tokens)
            if sequence.finish_reason is not None:
                self._end(request, sequence)
            elif sequence.grammar is not None:
                sequence.grammar.take(chosen.token_id)
        for router, tokens in outgoing.items():
            self._send(router, StepTokens(tuple(tokens)))

    def _end(self, request: DecodeRequest, sequence: Sequence) -> None:
        request.sequences.remove(sequence)
        self._slots.remove(sequence)
        if not request.sequences:
            self._requests.pop(request.transfer_id, None)

    def _cancel(self, router: bytes, item: Cancel) -> None:
        request = self._requests.get(attempt_id(item))
        if request is None or request.router != router:
            return
        if item.sample is None:
            self._drop(request)
            return
        request.cancelled.add(item.sample)
        for sequence in list(request.sequences):
            if sequence.sample == item.sample:
                self._end(request, sequence)

    def _drop(self, request: DecodeRequest) -> None:
        """Free everything of a request, in whatever state it is."""
        del self._requests[request.transfer_id]
        if request.joined:
            for sequence in request.sequences:
                self._slots.remove(sequence)
        else:
            self._inlet.close(request.transfer_id)
            self._free_tables(request)

    def _free_tables(self, request: DecodeRequest) -> None:
        for table in request.tables:
            self._blocks.free(table)

    def _fail(self, request: DecodeRequest, error: SplitserveError) -> None:
        self._drop(request)
        message = request.message
        log.warning("%s", error, extra={"request_id": message.request_id})
        self._send(request.router, Failed(message.request_id, message.attempt, error.code, str(error)))

    def _without_mask(self) -> list[GrammarState]:
        """Of sequences that wait for theirs."""
        sequences = [sequence for request in self._requests.values() for sequence in request.sequences]
        return [sequence.grammar for sequence in sequences if sequence.grammar and not sequence.grammar.ready]

    def _fail_unmasked(self) -> None:
        """Give up requests with a text that its grammar cannot go on from."""
        for request in list(self._requests.values()):
            errors = [sequence.grammar.error for sequence in request.sequences if sequence.grammar is not None]
            if error := next(filter(None, errors), None):
                self._fail(request, error)

    def _fail_deadlocked(self) -> None:
        """Nothing can run although something should: no page is free and the host tier is full."""
        victim = self._slots.stuck()
        if victim is not None:
            request = self._requests[attempt_id(victim)]
            self._fail(request, Overloaded("KV memory and the host tier are full; raise kv_transfer.host_tier", 1.0))
