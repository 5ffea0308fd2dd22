"""The prefill engine: prompts in, first tokens to the router, KV to the outlet.

submit -> waiting --pages--> running --last chunk--> sending --Delivered--> gone
             |                  |                       |
             +------------------+--- cancel, deadline --+----> gone, pages freed
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from splitserve.cluster.channel import Pollable
from splitserve.cluster.counts import BytesUsed, EngineCounts
from splitserve.cluster.errors import (
    DeadlineExceeded,
    InvalidRequest,
    ModelFailure,
    Overloaded,
    SplitserveError,
    WorkerUnavailable,
)
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import (
    Cancel,
    EngineSpeed,
    EngineStats,
    Failed,
    HandOff,
    Prefill,
    PrefixUpdate,
    SendPrefix,
    SendTo,
    transfer_id_of,
)
from splitserve.engine.block_manager import BlockManager
from splitserve.engine.device_sampler import TokenChooser
from splitserve.engine.grammar import Grammars, GrammarState, wait_for_mask
from splitserve.engine.ranks import Ranks
from splitserve.engine.sampler import SampledToken
from splitserve.engine.sequence import ModelLimits, Sequence
from splitserve.engine.serving import Send
from splitserve.kv_transfer.inlet import KvInlet
from splitserve.kv_transfer.outlet import KvOutlet
from splitserve.prefill_worker.batches import Batches
from splitserve.prefill_worker.fetcher import PrefixFetcher
from splitserve.prefill_worker.prompt_request import PromptRequest
from splitserve.prefill_worker.prompts import Prompts
from splitserve.prefill_worker.scheduler import plan_chunks

log = logging.getLogger(__name__)

UNKNOWN_PATIENCE_S = 1.0  # for a prefix that is fetched, while it is not known how long computing it takes


@dataclass(frozen=True)
class PrefillLimits:
    """`chunk_tokens`: prompt tokens computed a step; `max_requests`: waiting and running ones together."""

    chunk_tokens: int
    max_requests: int
    model: ModelLimits


class PrefillEngine:
    """Scheduler and state of one prefill engine; single-threaded. What others have cached comes by `prefixes`."""

    def __init__(
        self,
        name: str,
        incarnation: str,
        ranks: Ranks,
        blocks: BlockManager,
        layout: KvLayout,
        outlet: KvOutlet,
        chooser: TokenChooser,
        limits: PrefillLimits,
        grammars: Grammars,
        send: Send,
        clock: Callable[[], float] = time.monotonic,
        prefixes: KvInlet | None = None,
    ) -> None:
        self._name, self._incarnation, self._layout = name, incarnation, layout
        self._ranks, self._blocks, self._outlet = ranks, blocks, outlet
        self._limits, self._grammars, self._send, self._clock = limits, grammars, send, clock
        self._fetcher = None if prefixes is None else PrefixFetcher(prefixes, send, clock)
        self._prompts = Prompts()
        self._batches = Batches(ranks, blocks, outlet, chooser, clock)
        self._counts: Counter[str] = Counter()

    def handle(self, router: bytes, item: object) -> None:
        match item:
            case Prefill():
                self._submit(router, item)
            case SendTo():
                self._send_to(router, item)
            case SendPrefix():
                self._outlet.lend(item)
            case Cancel():
                self._cancel(router, item)
            case _:
                log.warning("a prefill engine takes no %s", type(item).__name__)

    def step(self) -> bool:
        """Settle transfers, admit prompts, launch one packed batch of chunks, finish what the device is done with."""
        self._settle_transfers()
        self._settle_fetches()
        late = self._without_mask()
        if self._batches.has_room:
            self._admit()
            if chunks := self._next_chunks():
                self._counts["prompt_tokens"] += sum(size for _, size in chunks)
                self._batches.launch(chunks)
        worked = bool(self._batches)
        for request, tokens in self._batches.take_done():
            self._answer(request, tokens)
        if worked or self._ranks.busy:
            return True
        if late:
            wait_for_mask(late)
        return bool(late)

    @property
    def sockets(self) -> list[Pollable]:
        return self._ranks.sockets

    @property
    def idle(self) -> bool:
        return not (self._prompts or self._batches)

    def forget(self, router: bytes) -> None:
        for request in self._prompts:
            if request.router == router:
                self._drop(request, "the router's lease ended")

    def expire(self) -> None:
        now = self._clock()
        for request in self._prompts:
            if now - request.arrived > request.message.deadline_s:
                self._fail(request, DeadlineExceeded("the deadline passed during prefill"))
        unopened = [request for request in self._prompts.waiting if request.sequence.table is None]
        self._outlet.keep([request.ticket for request in unopened if request.ticket is not None])

    def stats(self) -> EngineStats:
        traffic = self._outlet.traffic
        return EngineStats(
            engine=self._name,
            incarnation=self._incarnation,
            role="prefill",
            layout=self._layout,
            running=len(self._prompts.running),
            waiting=len(self._prompts.waiting),
            free_tokens=self._blocks.free_pages * self._blocks.page_size,
            total_tokens=self._blocks.num_pages * self._blocks.page_size,
            preemptions=0,
            slots=0,
            host_tier=self._blocks.host_bytes(self._layout.bytes_per_page),
            staging=BytesUsed(0, 0) if self._fetcher is None else self._fetcher.staging,
            counts=EngineCounts(**self._counts),
            transfers=traffic.transfers,
            links_up=traffic.links_up,
            speed=self._speed,
        )

    def prefix_update(self, since: int) -> PrefixUpdate | None:
        return self._blocks.prefixes.update(self._name, self._incarnation, since)

    def _submit(self, router: bytes, item: Prefill) -> None:
        sequence = Sequence.of(item, 0, self._limits.model)
        uncached = len(item.token_ids) - self._blocks.cached_tokens(item.token_ids, item.extra_keys)
        request = PromptRequest(router, item, sequence, self._clock(), uncached)
        try:
            self._check(item)
        except SplitserveError as error:
            self._send(router, Failed(item.request_id, item.attempt, error.code, str(error)))
            return
        sequence.constrain(self._grammars)
        self._prompts.waiting.append(request)
        self._fetch(request)

    def _fetch(self, request: PromptRequest) -> None:
        """Have what another engine has cached sent here, if that is more than there is."""
        message, page_size = request.message, self._blocks.page_size
        if self._fetcher is None or message.cached is None or message.params.prompt_logprobs is not None:
            return
        tokens = len(message.token_ids)
        stop = min(message.cached.num_tokens, tokens - 1) // page_size * page_size
        lacking = stop - (tokens - request.uncached)
        if lacking > 0 and not self._fetcher.follow(request, stop) and self._open(request):
            speed = self._speed
            self._fetcher.begin(request, stop, speed.compute_s(speed.pending_tokens) or UNKNOWN_PATIENCE_S)

    def _send_to(self, router: bytes, item: SendTo) -> None:
        transfer_id = transfer_id_of(item.request_id, item.attempt)
        request = self._prompts.find(transfer_id) if item.ticket.transfer_id == transfer_id else None
        if request is None or (request.router, request.ticket) != (router, None):
            self._outlet.decline(item.ticket, "prefill has ended this request")
            return
        request.ticket = item.ticket
        if request.sequence.table is not None:
            self._outlet.send_to(item.ticket)

    @property
    def _speed(self) -> EngineSpeed:
        return EngineSpeed(
            self._prompts.tokens + self._batches.tokens,
            self._limits.chunk_tokens,
            *self._batches.line,
            rested_s=self._batches.rested_s,
            fetched_token_s=0.0 if self._fetcher is None else self._fetcher.token_s,
        )

    def _check(self, item: Prefill) -> None:
        self._limits.model.check(item)
        if self._prompts.find(transfer_id_of(item.request_id, item.attempt)) is not None:
            raise InvalidRequest("request_id", item.request_id, "this attempt is under way already")
        if len(self._prompts.waiting) + len(self._prompts.running) >= self._limits.max_requests:
            raise Overloaded(f"{self._name} has {self._limits.max_requests} prompts already", 1.0)

    def _cancel(self, router: bytes, item: Cancel) -> None:
        request = self._prompts.find(transfer_id_of(item.request_id, item.attempt))
        if request is not None and request.router == router and item.sample is None:
            self._drop(request, "cancelled")

    def _admit(self) -> None:
        """Take in no more prompts than the next step can compute: later ones may find prefixes that these leave."""
        while self._prompts.running_tokens < self._limits.chunk_tokens:
            request = self._next()
            if request is None:
                return
            table = request.table
            self._prompts.start(request)
            request.started = self._clock()
            request.sequence.computed_tokens = table.cached_tokens
            if request.message.params.prompt_logprobs is None:
                self._counts["queried_tokens"] += len(request.message.token_ids)
                self._counts["cached_tokens"] += table.cached_tokens

    def _next(self) -> PromptRequest | None:
        """The first prompt that can begin. While it finds no pages, only those that have theirs go before it."""
        room = True
        for request in [request for request in self._prompts.waiting if request.can_begin]:
            if request.sequence.table is not None:
                return request
            try:
                room = room and self._open(request)
            except SplitserveError as error:
                self._prompts.remove(request)
                self._report(request, error)
                continue
            if room:
                return request
        return None

    def _open(self, request: PromptRequest) -> bool:
        """Get pages for a prompt, if there are any. Raises TransferFailed when its reservation is gone."""
        request.sequence.table = self._outlet.open(request.message, request.ticket)
        return request.sequence.table is not None

    def _without_mask(self) -> list[GrammarState]:
        """Of prompts that wait for the mask of their first token; those that will have none fail."""
        late = []
        for request in list(self._prompts.waiting):
            if (grammar := request.missing_mask) is None:
                continue
            if grammar.error:
                self._fail(request, grammar.error)
            else:
                late.append(grammar)
        return late

    def _next_chunks(self) -> list[tuple[PromptRequest, int]]:
        running = self._prompts.running
        sizes = plan_chunks([request.sequence.pending_tokens for request in running], self._limits.chunk_tokens)
        return [(request, size) for request, size in zip(running, sizes, strict=True) if size]

    def _answer(self, request: PromptRequest, tokens: list[tuple[Sequence, SampledToken | None]]) -> None:
        """Tell the router the first tokens of a prompt's samples at once; the KV follows."""
        if request not in self._prompts.running:
            return  # dropped while it was under way
        taken = [sample.take(token.token_id, token.logprobs) for sample, token in tokens if token is not None]
        if len(taken) < len(tokens):
            self._fail(request, ModelFailure("the model's logits are not finite"))
            return
        self._counts["output_tokens"] += len(taken)
        self._prompts.computed(request)
        self._send(request.router, request.first_token(tuple(taken), self._clock()))
        self._outlet.finish(request.transfer_id, HandOff(tuple(token.token_id for token in taken)))

    def _settle_transfers(self) -> None:
        for delivered in self._outlet.poll():
            request = self._prompts.find(delivered.transfer_id)
            if request is not None:
                self._prompts.remove(request)
                if delivered.error is not None:
                    self._report(request, WorkerUnavailable(delivered.error))

    def _settle_fetches(self) -> None:
        """What has come is cached here, too."""
        for request in [] if self._fetcher is None else self._fetcher.poll():
            tokens = len(request.message.token_ids)
            self._counts["fetched_tokens"] += request.table.cached_tokens - (tokens - request.uncached)
            request.uncached = tokens - request.table.cached_tokens
            self._blocks.publish(request.table, request.message.token_ids, request.table.cached_tokens)

    def _fail(self, request: PromptRequest, error: SplitserveError) -> None:
        self._drop(request, str(error))
        self._report(request, error)

    def _report(self, request: PromptRequest, error: SplitserveError) -> None:
        message = request.message
        log.warning("%s", error, extra={"request_id": message.request_id})
        self._send(request.router, Failed(message.request_id, message.attempt, error.code, str(error)))

    def _drop(self, request: PromptRequest, reason: str) -> None:
        if self._fetcher is not None:
            self._fetcher.abort(request)
        if request.sequence.table is not None:
            self._outlet.abort(request.transfer_id, reason)
        elif request.ticket is not None:
            self._outlet.decline(request.ticket, reason)
        self._prompts.remove(request)
