"""One request inside the router: what it asks, the attempts that serve it, and what has come of them so far."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from splitserve.cluster.errors import SplitserveError
from splitserve.cluster.messages import Busy, Cached, Failed, FirstToken, Granted, Joined, SampleToken, TokenLogprobs
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.attempt import Attempt
from splitserve.router.deadline import Deadline
from splitserve.router.detokenizer import Detokenizer
from splitserve.router.fair import Claimant
from splitserve.router.output_buffer import Answered, Delta, OutputBuffer, SampleOutput
from splitserve.router.policy import Placement
from splitserve.router.timeline import Timeline, Timings
from splitserve.router.traces import RequestTrace

LOST_RETRY_S = 0.05
GOING_ON_QUEUES = 2.0
MOST_LOSSES = 10  # of one sample: a request that brings its workers down must not bring down all of them
# What another attempt may mend: engines that cannot reach each other, or that have no room any more.
NOBODY = Claimant()
PASSING = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


@dataclass(frozen=True)
class Summary:
    """How a request went, for the last message to its client. `losses`: how often it had to go on elsewhere."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    timings: Timings
    placement: Placement
    losses: int


class Chunk(NamedTuple):
    """What is new of a request. `prompt_logprobs` come once, with the first chunk."""

    request_id: str
    deltas: list[Delta]
    prompt_logprobs: tuple[TokenLogprobs, ...]


class Request:
    """A request from its arrival to its one outcome.

    `on_stop_string(request_id, sample)` is called at once when a sample ends by a stop string: its engine knows nothing
    of that. `answered` has for each sample what its client has already, if anything. `claimant` is who asks. Only
    requests with the same `extra_keys` share cached prefixes.
    """

    def __init__(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        deadline: Deadline,
        timeline: Timeline,
        new_detokenizer: Callable[[], Detokenizer],
        on_stop_string: Callable[[str, int], None],
        answered: Sequence[Answered] = (),
        claimant: Claimant = NOBODY,
        extra_keys: tuple[str, ...] = (),
    ) -> None:
        self.id, self.claimant, self.extra_keys = request_id, claimant, extra_keys
        self.placement = Placement()  # of its latest attempt
        self.deadline, self.timeline = deadline, timeline
        self.broken: set[Placement] = set()  # pairs of engines between which its KV was lost
        self.tasks: set[asyncio.Task[None]] = set()
        self._token_ids, self._params = token_ids, params
        self._attempts: dict[int, Attempt] = {}
        self._last_attempt = 0
        self._cached_tokens: int | None = None
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self.samples = [
            SampleOutput(index, len(token_ids), new_detokenizer(), params.stop) for index in range(params.n)
        ]
        for sample, known in zip(self.samples, answered, strict=bool(answered)):
            sample.restore(known)
        self._known = [len(sample.token_ids) for sample in self.samples]
        if any(self._known):
            self._cached_tokens = 0  # the client has had the first tokens, and what comes with them
        self._output = OutputBuffer(self.samples, partial(on_stop_string, request_id))

    @property
    def waited_s(self) -> float:
        """Seconds since it arrived."""
        return self.timeline.age_s

    @property
    def finished(self) -> bool:
        """Whether every sample has its last token and all has been taken by `chunk`."""
        return self._output.drained

    @property
    def losses(self) -> int:
        """How often it had to go on elsewhere: as often as any of its samples had to."""
        return max(sample.losses for sample in self.samples)

    @property
    def goes_on(self) -> bool:
        """Whether others have answered part of it."""
        return any(self._known) or self.losses > 0

    @property
    def queues(self) -> float:
        """How many times the queue's bound may wait before it.

        What was lost here is never refused. Of going on from another router any client may speak: it has a bound.
        """
        if self.losses:
            return math.inf
        return GOING_ON_QUEUES if self.goes_on else 1.0

    @property
    def attempts(self) -> list[Attempt]:
        """Those that go on, or have ended well."""
        return list(self._attempts.values())

    @property
    def held(self) -> list[Attempt]:
        """Attempts of which engines may hold something."""
        return [attempt for attempt in self.attempts if attempt.is_held]

    @property
    def stage(self) -> str:
        """Where it is, for messages to people."""
        if not self.placement.decode:
            return "waiting for its turn"
        if any(attempt.joined for attempt in self._attempts.values()):
            return f"decoding on {self.placement.decode}"
        return f"between {self.placement.prefill} and {self.placement.decode}"

    def tokens_of(self, sample: SampleOutput) -> list[int]:
        """All tokens of `sample` so far, the prompt's first."""
        return self._token_ids + sample.token_ids

    def attempt(
        self,
        samples: Sequence[SampleOutput],
        placement: Placement,
        to_compute: int,
        holder: str = "",
        cached: Cached | None = None,
    ) -> Attempt:
        """Go to engines with `samples`, for what they do not have yet; prefill has so many `to_compute`."""
        self._last_attempt += 1
        params = self._params if self._cached_tokens is None else replace(self._params, prompt_logprobs=None)
        prompt, number = self._token_ids, self._last_attempt
        attempt = Attempt(
            self.id, number, placement, samples, prompt, params, self.extra_keys, to_compute, holder, cached
        )
        self._attempts[attempt.number] = attempt
        self.placement = placement
        return attempt

    def has(self, attempt: int) -> bool:
        """Whether an attempt goes on."""
        return attempt in self._attempts

    def get(self, attempt: int) -> Attempt:
        """An attempt that goes on."""
        return self._attempts[attempt]

    def accept_token(self, token: SampleToken, now: float) -> None:
        """Take a token from decode, of an attempt that goes on, at `now` of the monotonic clock."""
        self._attempts[token.attempt].joined = True
        self.timeline.token(now)
        self._output.accept(token)

    def accept(self, message: Granted | Busy | FirstToken | Joined | Failed) -> Attempt | None:
        """Take anything else about an attempt that goes on. Returns it when it is lost by that."""
        attempt = self._attempts[message.attempt]
        match message:
            case Granted():
                self.timeline.placed(attempt)
                self._answer(attempt, message)
                if attempt.early is not None:
                    self._accept_first(attempt.early)
            case Busy():
                self._answer(attempt, message)
            case FirstToken() if not attempt.reply.done():
                attempt.early = message
            case FirstToken():
                self._accept_first(message)
            case Joined():
                attempt.joined = True
                self.timeline.joined(attempt.number)
            case Failed(code=code) if not attempt.reply.done():
                self._answer(attempt, Busy(self.id, attempt.number, LOST_RETRY_S) if code in PASSING else message)
            case Failed(code=code) if code in PASSING and attempt.unfinished:
                self.broken.add(attempt.placement)
                return self._attempts.pop(attempt.number)
            case Failed():
                self.fail(error_of(message))
        return None

    def fail(self, error: SplitserveError) -> None:
        """End the request with `error`, unless it has ended."""
        self._output.fail(error)

    def lose(self, engine: str) -> list[Attempt]:
        """`engine` is gone: the attempts that needed it are lost. One that is not granted yet counts as refused."""
        needing = [attempt for attempt in self._attempts.values() if attempt.needs(engine)]
        for attempt in needing:
            if not attempt.reply.done():
                self._answer(attempt, Busy(self.id, attempt.number, LOST_RETRY_S))
        return [attempt for attempt in needing if self._attempts.pop(attempt.number, None) is not None]

    async def chunk(self) -> Chunk:
        """Wait for something new and take all of it. Raises the error that ended the request."""
        deltas = await self._output.drain()
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        return Chunk(self.id, deltas, prompt_logprobs)

    def summary(self) -> Summary:
        """The account of a finished request."""
        lengths = [len(sample.token_ids) for sample in self.samples]
        new = max(length - known for length, known in zip(lengths, self._known, strict=True))
        return Summary(
            request_id=self.id,
            prompt_tokens=len(self._token_ids),
            cached_tokens=self._cached_tokens or 0,
            completion_tokens=sum(lengths),
            timings=self.timeline.timings(new),
            placement=self.placement,
            losses=self.losses,
        )

    def trace(self, code: str) -> RequestTrace:
        """Where its time went, now that it is over with a gRPC status."""
        ended = time.monotonic()
        return RequestTrace(
            request_id=self.id,
            code=code,
            began=self.timeline.arrived,
            ended=ended,
            prompt_tokens=len(self._token_ids),
            cached_tokens=self._cached_tokens or 0,
            output_tokens=sum(len(sample.token_ids) for sample in self.samples),
            spans=partial(self.timeline.spans, ended),
        )

    def _answer(self, attempt: Attempt, reply: Granted | Busy | Failed) -> None:
        if not isinstance(reply, Granted):  # what happens to that engine is no longer this request's concern
            del self._attempts[attempt.number]
            self.placement = Placement()
        if not attempt.reply.done():
            attempt.reply.set_result(reply)

    def _accept_first(self, message: FirstToken) -> None:
        self.timeline.prefilled(message.attempt, message.queue_s, message.prefill_s, message.cached_tokens)
        if self._cached_tokens is None:
            self.timeline.first_token(message.queue_s, message.prefill_s)
            self._cached_tokens = message.cached_tokens
            self._prompt_logprobs = message.prompt_logprobs or ()
        for token in message.tokens:
            self._output.accept(token)


def error_of(message: Failed) -> SplitserveError:
    """What an engine failed with."""
    error = SplitserveError(message.message)
    error.code = message.code
    return error
