"""One request inside the router: what it asks, which engines serve it, and what they have said so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from splitserve.cluster.errors import SplitserveError, WorkerUnavailable
from splitserve.cluster.messages import Busy, Failed, FirstToken, Granted, Joined, SampleToken, TokenLogprobs
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.detokenizer import Detokenizer
from splitserve.router.output_buffer import Delta, OutputBuffer, SampleOutput
from splitserve.router.timeline import Timeline, Timings

LOST_RETRY_S = 0.05


@dataclass(frozen=True)
class Placement:
    """The engines of one attempt, by name; empty while it has none."""

    prefill: str = ""
    decode: str = ""


@dataclass(frozen=True)
class Summary:
    """How a request went, for the last message to its client."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    timings: Timings
    placement: Placement


@dataclass(frozen=True, slots=True)
class Chunk:
    """What is new of a request. `prompt_logprobs` come once, with the first chunk."""

    request_id: str
    deltas: list[Delta]
    prompt_logprobs: tuple[TokenLogprobs, ...]


class Request:
    """A request from its arrival to its one outcome. What earlier attempts' engines still say is ignored.

    `on_stop_string(sample)` is called at once when a sample ends by a stop string, which its engine knows nothing of.
    """

    def __init__(
        self,
        request_id: str,
        token_ids: list[int],
        params: SamplingParams,
        deadline_s: float,
        new_detokenizer: Callable[[], Detokenizer],
        on_stop_string: Callable[[int], None],
    ) -> None:
        self.id = request_id
        self.token_ids = token_ids
        self.params = params
        self.attempt = 0
        self.placement = Placement()
        self.timeline = Timeline()
        self._deadline = time.monotonic() + deadline_s
        self._joined = False
        self._cached_tokens = 0
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._reply: asyncio.Future[Granted | Busy] | None = None
        self._samples = [
            SampleOutput(index, len(token_ids), new_detokenizer(), params.stop) for index in range(params.n)
        ]
        self._output = OutputBuffer(self._samples, on_stop_string)

    @property
    def remaining_s(self) -> float:
        """Seconds until its deadline."""
        return max(self._deadline - time.monotonic(), 0.0)

    @property
    def finished(self) -> bool:
        """Whether every sample has its last token and all has been taken by `chunk`."""
        return self._output.drained

    @property
    def engines_are_done(self) -> bool:
        """Whether decode ended every sample by itself, so that no engine holds anything."""
        return self._joined and self._output.complete and not any(sample.stopped_by_string for sample in self._samples)

    @property
    def stage(self) -> str:
        """Where it is, for messages to people."""
        if not self.placement.decode:
            return "waiting for its turn"
        if self._joined:
            return f"decoding on {self.placement.decode}"
        return f"between {self.placement.prefill} and {self.placement.decode}"

    def begin_attempt(self, placement: Placement) -> asyncio.Future[Granted | Busy]:
        """Go to other engines. The future is the decode engine's answer."""
        self.attempt += 1
        self.placement = placement
        self._joined = False
        self._reply = asyncio.get_running_loop().create_future()
        return self._reply

    def accept_token(self, token: SampleToken) -> None:
        """Take a token from decode."""
        if token.attempt == self.attempt:
            self._joined = True
            self.timeline.token()
            self._output.accept(token)

    def accept(self, message: Granted | Busy | FirstToken | Joined | Failed) -> None:
        """Take anything else that an engine says about this request."""
        if message.attempt != self.attempt:
            return
        match message:
            case Granted() | Busy():
                if isinstance(message, Busy):
                    self.placement = Placement()  # what happens to that engine is no longer this request's concern
                if self._reply is not None and not self._reply.done():
                    self._reply.set_result(message)
            case FirstToken():
                self._accept_first(message)
            case Joined():
                self._joined = True
                self.timeline.joined()
            case Failed():
                self.fail(_error(message))

    def fail(self, error: SplitserveError) -> None:
        """End the request with `error`, unless it has ended."""
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)
        self._output.fail(error)

    def lose(self, engine: str, reason: str) -> None:
        """Fail if `engine`, which is gone, was still needed. If it was only asked for room, it has refused."""
        if engine == self.placement.decode and self._reply is not None and not self._reply.done():
            self.accept(Busy(self.id, self.attempt, LOST_RETRY_S))
        elif engine == self.placement.decode or (engine == self.placement.prefill and not self._joined):
            self.fail(WorkerUnavailable(f"worker {engine} {reason}; send the request again"))

    async def chunk(self) -> Chunk:
        """Wait for something new and take all of it. Raises the error that ended the request."""
        deltas = await self._output.drain()
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        return Chunk(self.id, deltas, prompt_logprobs)

    def summary(self) -> Summary:
        """The account of a finished request."""
        lengths = [sample.num_tokens for sample in self._samples]
        return Summary(
            request_id=self.id,
            prompt_tokens=len(self.token_ids),
            cached_tokens=self._cached_tokens,
            completion_tokens=sum(lengths),
            timings=self.timeline.timings(max(lengths)),
            placement=self.placement,
        )

    def _accept_first(self, message: FirstToken) -> None:
        self.timeline.first_token(message.queue_s, message.prefill_s)
        self._cached_tokens = message.cached_tokens
        self._prompt_logprobs = message.prompt_logprobs or ()
        for token in message.tokens:
            self._output.accept(token)


def _error(message: Failed) -> SplitserveError:
    error = SplitserveError(message.message)
    error.code = message.code
    return error
