"""The life of a request between its client and its engines.

    admit -> place -> Reserve -> Granted -> Prefill -> FirstToken -> ... StepTokens ... -> finished
      |        ^         |  ^       (decode)    (prefill)               (decode)
      |        |         v  |
      |        |        Busy: another engine, else wait in line
      |        +-------- engine lost, KV lost: go on elsewhere from the tokens that are there
      +-- Overloaded     deadline, cancelled call, Failed: Cancel to both engines, one error

Whatever happens, `Dispatcher.serve` ends once: with the summary of a finished request, or with one error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.errors import GivenUp, SplitserveError
from splitserve.cluster.messages import (
    Busy,
    Cancel,
    Failed,
    FetchPrefix,
    FirstToken,
    Granted,
    Joined,
    SampleToken,
    StepTokens,
)
from splitserve.cluster.sampling import SamplingParams
from splitserve.cluster.topology_sections import Router as RouterSettings
from splitserve.router.admission import Admission
from splitserve.router.attempt import Attempt, by_attempt
from splitserve.router.deadline import Deadline
from splitserve.router.detokenizer import Detokenizer
from splitserve.router.engines import Engines
from splitserve.router.fair import Claimant, FairSemaphore
from splitserve.router.metrics import AttemptReason, RouterMetrics, outcome
from splitserve.router.output_buffer import Answered, SampleOutput
from splitserve.router.placer import Placer
from splitserve.router.policy import has_room
from splitserve.router.request import MOST_LOSSES, Chunk, Request, Summary, error_of
from splitserve.router.tenants import Tenant
from splitserve.router.timeline import Timeline
from splitserve.router.traces import RecentRequests, RequestTrace

log = logging.getLogger(__name__)

NO_WORKER_RETRY_S = 0.1

ExportTrace = Callable[[RequestTrace, str | None], None]
Write = Callable[[Chunk], Awaitable[None]]
FromEngine = SampleToken | Granted | Busy | FirstToken | Joined | Failed | FetchPrefix


class Dispatcher:
    """Serves requests with the engines of one cluster.

    `identity` is unique among its routers. `export` gets every request that is over, with its traceparent.
    """

    def __init__(
        self,
        identity: str,
        settings: RouterSettings,
        worker_timeout_s: float,
        keys: CurveKeys | None,
        new_detokenizer: Callable[[], Detokenizer],
        export: ExportTrace | None = None,
    ) -> None:
        self.admission = Admission(settings.max_queue, settings.max_active)
        self.engines = Engines(identity, keys, worker_timeout_s, self._on_message, self._on_lost)
        self._placer = Placer(self.engines, settings)
        self.metrics = RouterMetrics(self.admission, self.engines, lambda: self.ready)
        self.recent = RecentRequests()
        self._export = export
        self._identity = identity
        self._new_detokenizer = new_detokenizer
        self._requests: dict[str, Request] = {}
        self._ids = itertools.count(1)
        self._line = FairSemaphore(1)  # of requests that found every engine busy

    @property
    def ready(self) -> bool:
        """Whether a request could be placed now."""
        return bool(self.engines.views("prefill", "colocated") and self.engines.views("decode", "colocated"))

    async def serve(
        self,
        token_ids: list[int],
        params: SamplingParams,
        deadline: Deadline,
        write: Write,
        answered: Sequence[Answered] = (),
        *,
        tenant: Tenant,
        priority: int = 0,
        cache_salt: str = "",
        traceparent: str | None = None,
    ) -> Summary:
        """Take a request to its one outcome: every chunk written and the summary returned, or an error raised.

        What its client has `answered`, one for each sample, is not written again. Where not all can go on at once,
        those with the smallest `priority` do. Only those with the same `cache_salt` share cached prefixes.
        `traceparent` names the span that it is a part of, as W3C's header does.
        """
        cost = len(token_ids) + params.n * tenant.answer_tokens(params.max_tokens)
        claimant = Claimant(tenant.name, priority, cost)
        extra_keys = (cache_salt,) if cache_salt else ()
        request = self._new_request(token_ids, params, deadline, answered, claimant, extra_keys)
        with outcome(partial(self._end, request, tenant, traceparent)):
            summary = await self._answer(request, write, tenant)
            self._account(summary)
            return summary

    async def _answer(self, request: Request, write: Write, tenant: Tenant) -> Summary:
        def stage() -> str:
            return request.stage if self.ready else f"{request.stage}; not all pools have a worker that is ready"

        admission = self.admission.admit(request.claimant, request.queues)
        async with request.deadline.bounds(stage), admission:
            first, *others = by_attempt(request.samples) or [[]]
            if first:
                await self._begin(request, first, "new")
            self._begin_later(request, others, "new")
            while not request.finished:
                chunk = await request.chunk()
                tenant.take_tokens(sum(len(delta.token_ids) for delta in chunk.deltas))
                await write(chunk)
        return request.summary()

    def _end(self, request: Request, tenant: Tenant, traceparent: str | None, code: str) -> None:
        self._forget(request)
        self.metrics.requests.labels(code).inc()
        trace = request.trace(code)
        if trace.output_tokens:
            tenant.answered(trace.output_tokens / len(request.samples))
        self.recent.add(trace)
        if self._export is not None:
            self._export(trace, traceparent)

    def _account(self, summary: Summary) -> None:
        """Measure a request that was answered."""
        metrics, timings = self.metrics, summary.timings
        if timings.tpot_s:
            metrics.tpot.observe(timings.tpot_s)
        metrics.decode.observe(timings.decode_s)
        metrics.total.observe(timings.total_s)
        metrics.prompt.observe(summary.prompt_tokens)
        metrics.output.observe(summary.completion_tokens)
        metrics.cached.inc(summary.cached_tokens)
        self.recent.answered(timings)

    def _new_request(
        self,
        token_ids: list[int],
        params: SamplingParams,
        deadline: Deadline,
        answered: Sequence[Answered],
        claimant: Claimant,
        extra_keys: tuple[str, ...],
    ) -> Request:
        request_id = f"{self._identity}-{next(self._ids)}"
        self._requests[request_id] = request = Request(
            request_id,
            token_ids,
            params,
            deadline,
            Timeline(self.metrics, goes_on=any(sample.token_ids for sample in answered)),
            self._new_detokenizer,
            self._on_stop_string,
            answered,
            claimant,
            extra_keys,
        )
        return request

    async def _begin(self, request: Request, samples: Sequence[SampleOutput], why: AttemptReason) -> None:
        """Get room on some decode engine, then ask a prefill engine for the KV. Whom all refuse waits in line."""
        if not self._line.locked:
            if await self._ask(request, samples, why, in_line=False) is None:
                return
            why = "busy"
        with self.admission.wait(request.queues):
            claim = self._line.claim(request.claimant)  # who is refused has got nothing of its share
            while True:
                async with self._line.hold(claim):
                    while not self._line.outranked(claim):
                        if (retry_s := await self._ask(request, samples, why, in_line=True)) is None:
                            return
                        why = "busy"
                        await asyncio.sleep(retry_s)

    async def _ask(
        self, request: Request, samples: Sequence[SampleOutput], why: AttemptReason, *, in_line: bool
    ) -> float | None:
        """Ask decode engines, the best placed first, until one has room; else after how many seconds to ask again.

        Prefill is asked at once where decode is known to have room and nobody is `in_line`.
        """
        refusals: dict[str, float] = {}
        while True:
            prefills = self.engines.views("prefill", "colocated")
            decodes = self.engines.views("decode", "colocated")
            untried = [view for view in decodes if view.engine not in refusals]
            if not prefills or not untried:
                return min(refusals.values(), default=NO_WORKER_RETRY_S)
            wanted = self._placer.wanted(request, samples[0])
            attempt = self._placer.place(request, samples, prefills, untried, wanted)
            self.metrics.attempts["busy" if refusals else why].inc()
            prefill, decode = attempt.placement
            room = has_room(next(one for one in untried if one.engine == decode), wanted)
            lacking = 0 if decode == prefill else wanted.uncached(decode)
            reply = await self._reserve(request, attempt, lacking, early=room and not in_line and decode != prefill)
            if isinstance(reply, Granted):
                return None
            refusals[decode] = reply.retry_after_s

    async def _reserve(self, request: Request, attempt: Attempt, lacking: int, *, early: bool) -> Granted | Busy:
        """Ask decode, which lacks so many tokens, and prefill: once decode has granted or, `early`, at once.

        Raises what either failed with.
        """
        prefill, decode = attempt.placement
        self.engines.place(decode, attempt.reserve(self.engines.layout(prefill), request.deadline.remaining_s), lacking)
        if early:
            self._prefill(request, attempt)
        reply = await attempt.reply
        if isinstance(reply, Granted) and request.has(attempt.number):  # else lost since: others go on already
            if not early:
                self._prefill(request, attempt)
            self.engines.send(prefill, attempt.send_to(reply.ticket))
        elif early:
            self._cancel(attempt)
        if isinstance(reply, Failed):
            raise error_of(reply)
        return reply

    def _prefill(self, request: Request, attempt: Attempt) -> None:
        self._placer.note(attempt.placement)
        self.engines.place(attempt.placement.prefill, attempt.prefill(request.deadline.remaining_s), attempt.to_compute)

    def _cancel(self, attempt: Attempt, sample: int | None = None) -> None:
        for engine in set(attempt.placement):
            self.engines.send(engine, attempt.cancel(sample))

    def _go_on(self, request: Request, lost: Attempt, why: AttemptReason, reason: str) -> None:
        """Have other engines do what is left of `lost`. `reason` tells people more than `why`."""
        self._cancel(lost)
        request.timeline.lost(lost.number, reason)
        for sample in lost.samples:
            sample.losses += 1
        log.warning("going on elsewhere", extra={"request_id": request.id, "reason": reason, "losses": request.losses})
        if request.losses > MOST_LOSSES:
            request.fail(GivenUp(f"given up after {MOST_LOSSES} losses, the last one: {reason}"))
            return
        self._begin_later(request, by_attempt(lost.samples), why)

    def _begin_later(self, request: Request, groups: Sequence[Sequence[SampleOutput]], why: AttemptReason) -> None:
        async def begin(samples: Sequence[SampleOutput]) -> None:
            try:
                await self._begin(request, samples, why)
            except SplitserveError as error:
                request.fail(error)

        for samples in groups:
            task = asyncio.ensure_future(begin(samples))
            request.tasks.add(task)
            task.add_done_callback(request.tasks.discard)

    def _forget(self, request: Request) -> None:
        del self._requests[request.id]
        for task in request.tasks:
            task.cancel()
        for attempt in request.attempts:
            if attempt.is_held:
                self._cancel(attempt)
            else:
                self.engines.over(attempt.placement.decode, request.id, attempt.number)
        outcome = {"request_id": request.id, "finished": request.finished, "tenant": request.claimant.tenant}
        log.info("request over", extra=outcome)

    def _on_message(self, engine: str, message: Any) -> None:
        if type(message) is StepTokens:
            requests, now = self._requests, time.monotonic()
            for token in message.tokens:
                request = requests.get(token.request_id)
                if request is None or not request.has(token.attempt):
                    self._refuse(engine, token)
                else:
                    request.accept_token(token, now)
        elif isinstance(message, Granted | Busy | FirstToken | Joined | Failed | FetchPrefix):
            request = self._requests.get(message.request_id)
            if request is None or not request.has(message.attempt):
                self._refuse(engine, message)
            elif isinstance(message, FetchPrefix):
                attempt = request.get(message.attempt)
                self.engines.send(attempt.holder, attempt.send_prefix(message.ticket))
            elif lost := request.accept(message):
                self._go_on(request, lost, "failed", getattr(message, "message", ""))
        else:
            log.warning("unexpected message", extra={"engine": engine, "message_type": type(message).__name__})

    def _refuse(self, engine: str, message: FromEngine) -> None:
        """Of an attempt that is over, or lost: if its engine goes on with it, it shall not."""
        if isinstance(message, SampleToken | Granted):
            self.engines.send(engine, Cancel(message.request_id, message.attempt))

    def _on_stop_string(self, request_id: str, sample: int) -> None:
        for attempt in self._requests[request_id].held:
            self._cancel(attempt, sample)

    def _on_lost(self, engine: str, reason: str) -> None:
        for request in list(self._requests.values()):
            for lost in request.lose(engine):
                self._go_on(request, lost, "engine_lost", f"worker {engine} {reason}")
