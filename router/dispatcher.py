"""The life of a request between its client and its engines.

    admit -> place -> Reserve -> Granted -> Prefill -> FirstToken -> ... StepTokens ... -> finished
      |                  |  ^       (decode)    (prefill)               (decode)
      |                  v  |
      |                 Busy: another engine, else wait in line
      +-- Overloaded     deadline, cancelled call, Failed, lost engine: Cancel to both engines, one error

Whatever happens, `Dispatcher.serve` ends once: with the summary of a finished request, or with one error.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from splitserve.cluster.channel import KV_IDLE_S, CurveKeys
from splitserve.cluster.errors import DeadlineExceeded, WorkerUnavailable
from splitserve.cluster.messages import (
    Busy,
    Cancel,
    Failed,
    FirstToken,
    Granted,
    Joined,
    Prefill,
    Reserve,
    StepTokens,
)
from splitserve.cluster.sampling import SamplingParams
from splitserve.cluster.topology import Router as RouterSettings
from splitserve.router.admission import Admission
from splitserve.router.detokenizer import Detokenizer
from splitserve.router.engines import Engines
from splitserve.router.policy import EngineView, place
from splitserve.router.request import Chunk, Placement, Request, Summary

log = logging.getLogger(__name__)

Write = Callable[[Chunk], Awaitable[None]]


class Dispatcher:
    """Serves requests with the engines of one cluster. `identity` is unique among its routers."""

    def __init__(
        self,
        identity: str,
        settings: RouterSettings,
        keys: CurveKeys | None,
        new_detokenizer: Callable[[], Detokenizer],
    ) -> None:
        self.admission = Admission(settings.max_queue, settings.max_active)
        self.engines = Engines(identity, keys, settings.worker_timeout_s, self._on_message, self._on_lost)
        self._identity = identity
        self._policy = settings.policy
        self._new_detokenizer = new_detokenizer
        self._requests: dict[str, Request] = {}
        self._ids = itertools.count(1)
        self._placements = itertools.count()
        self._links: dict[tuple[str, str], float] = {}  # when KV was last asked to go from prefill to decode
        self._line = asyncio.Lock()  # of requests that found every engine busy: asyncio's locks are fair

    @property
    def ready(self) -> bool:
        """Whether a request could be placed now."""
        return bool(self.engines.views("prefill", "colocated") and self.engines.views("decode", "colocated"))

    async def serve(self, token_ids: list[int], params: SamplingParams, deadline_s: float, write: Write) -> Summary:
        """Take a request to its one outcome: every chunk written and the summary returned, or an error raised."""
        request = self._new_request(token_ids, params, deadline_s)
        try:
            async with asyncio.timeout(deadline_s), self.admission.admit():
                granted = await self._reserve(request)
                self._prefill(request, granted)
                while not request.finished:
                    await write(await request.chunk())
            return request.summary()
        except TimeoutError as error:
            raise DeadlineExceeded(f"{deadline_s:g} s passed while {request.stage}") from error
        finally:
            self._forget(request)

    def _new_request(self, token_ids: list[int], params: SamplingParams, deadline_s: float) -> Request:
        def stop(sample: int) -> None:
            self._cancel(request, sample)

        request_id = f"{self._identity}-{next(self._ids)}"
        request = Request(request_id, token_ids, params, deadline_s, self._new_detokenizer, stop)
        self._requests[request_id] = request
        return request

    async def _reserve(self, request: Request) -> Granted:
        """Get room on some decode engine. Whom all refuse waits in line and asks again."""
        if not self._line.locked():
            reply = await self._ask(request)
            if isinstance(reply, Granted):
                return reply
        with self.admission.wait():
            async with self._line:
                while True:
                    reply = await self._ask(request)
                    if isinstance(reply, Granted):
                        return reply
                    await asyncio.sleep(reply.retry_after_s)

    async def _ask(self, request: Request) -> Granted | Busy:
        """Ask decode engines, the best placed first, until one has room; else the answer that retries soonest."""
        refusals: dict[str, Busy] = {}
        while True:
            prefills = self.engines.views("prefill", "colocated")
            decodes = self.engines.views("decode", "colocated")
            untried = [view for view in decodes if view.engine not in refusals]
            if not prefills or not decodes:
                missing = "decode" if prefills else "prefill"
                raise WorkerUnavailable(f"no {missing} worker is ready; try again in a moment")
            if not untried:
                return min(refusals.values(), key=lambda busy: busy.retry_after_s)
            prefill, decode = place(prefills, untried, self._policy, next(self._placements), self._linked())
            reply = await self._ask_one(request, prefill, decode)
            if isinstance(reply, Granted):
                return reply
            refusals[decode.engine] = reply

    async def _ask_one(self, request: Request, prefill: EngineView, decode: EngineView) -> Granted | Busy:
        reply = request.begin_attempt(Placement(prefill.engine, decode.engine))
        source = self.engines.layout(prefill.engine)
        self.engines.place(
            decode.engine,
            Reserve(request.id, request.attempt, request.token_ids, request.params, source, request.remaining_s),
        )
        return await reply

    def _linked(self) -> dict[tuple[str, str], float]:
        """Pairs of engines with a way for KV that is still open."""
        closed_before = time.monotonic() - KV_IDLE_S
        self._links = {pair: used_at for pair, used_at in self._links.items() if used_at > closed_before}
        return self._links

    def _prefill(self, request: Request, granted: Granted) -> None:
        request.timeline.placed()
        self._links[request.placement.prefill, request.placement.decode] = time.monotonic()
        self.engines.place(
            request.placement.prefill,
            Prefill(
                request.id, request.attempt, request.token_ids, request.params, granted.ticket, request.remaining_s
            ),
        )

    def _cancel(self, request: Request, sample: int | None = None) -> None:
        for engine in {request.placement.prefill, request.placement.decode}:
            self.engines.send(engine, Cancel(request.id, request.attempt, sample))

    def _forget(self, request: Request) -> None:
        del self._requests[request.id]
        if not request.engines_are_done:
            self._cancel(request)
        log.info("request over", extra={"request_id": request.id, "finished": request.finished})

    def _on_message(self, engine: str, message: Any) -> None:
        if type(message) is StepTokens:
            requests = self._requests
            for token in message.tokens:
                request = requests.get(token.request_id)
                if request is not None:
                    request.accept_token(token)
        elif isinstance(message, Granted | Busy | FirstToken | Joined | Failed):
            request = self._requests.get(message.request_id)
            if request is not None:
                request.accept(message)
        else:
            log.warning("unexpected message", extra={"engine": engine, "message_type": type(message).__name__})

    def _on_lost(self, engine: str, reason: str) -> None:
        for request in list(self._requests.values()):
            request.lose(engine, reason)
