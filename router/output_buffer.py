"""From engines' tokens to what a client is sent: in order, as text, coalesced while the client is slow.

Tokens enter as they arrive and merge into one pending delta per sample; the response's writer takes whatever has
gathered. So a slow client gets fewer and larger messages, and never more memory than one response's text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from splitserve.cluster.errors import SplitserveError, WorkerUnavailable
from splitserve.cluster.messages import SampleToken, TokenLogprobs
from splitserve.router.detokenizer import Detokenizer
from splitserve.router.stop import StopMatcher


@dataclass(frozen=True, slots=True)
class Answered:
    """What a client has of a sample from a stream that broke off."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"] | None


@dataclass(slots=True)  # not frozen: that takes a microsecond a token
class Delta:
    """What is new of one sample. `logprobs` has one entry per token id, or none if they were not asked for."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: Literal["stop", "length"] | None


class SampleOutput:
    """One sample's tokens, put into the order of their positions (prefill's first token may come last of all)."""

    def __init__(self, index: int, position: int, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self.index = index
        self.finish_reason: Literal["stop", "length"] | None = None
        self.stopped_by_string = False
        self.drained = False  # whether the last delta has been taken
        self.token_ids: list[int] = []  # all of them
        self.losses = 0  # of attempts that were to answer it
        self._position = position
        self._early: dict[int, SampleToken] = {}
        self._detokenizer = detokenizer
        self._matcher = StopMatcher(stops) if stops else None
        self._text = ""
        self._new_token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []

    def restore(self, answered: Answered) -> None:
        """Stand where the client stands: nothing that it has comes again."""
        for token_id in answered.token_ids:
            self._append(SampleToken("", 0, self.index, self._position, token_id))
        self._text, self._new_token_ids = "", []
        if answered.finish_reason is not None:
            self.finish_reason, self.drained = answered.finish_reason, True

    def accept(self, token: SampleToken) -> None:
        """Take a token; one that was there before, or that follows the end, changes nothing."""
        if token.position > self._position:
            self._early[token.position] = token
        elif token.position == self._position:
            self._append(token)
            while self._early and self._position in self._early:
                self._append(self._early.pop(self._position))

    def drain(self) -> Delta | None:
        """Everything since the last drain, or None if that is nothing."""
        if not self._new_token_ids and (self.finish_reason is None or self.drained):
            return None
        self.drained = self.finish_reason is not None
        delta = Delta(self.index, self._text, self._new_token_ids, self._logprobs, self.finish_reason)
        self._text, self._new_token_ids, self._logprobs = "", [], []
        return delta

    def forget_early(self) -> None:
        """What came before its turn comes again: the attempt that it is of is lost."""
        self._early.clear()

    def _append(self, token: SampleToken) -> None:
        self._position += 1
        if self.finish_reason is not None:
            return
        self.token_ids.append(token.token_id)
        self._new_token_ids.append(token.token_id)
        if token.logprobs is not None:
            self._logprobs.append(token.logprobs)
        if token.finish_reason != "stop":  # the token that stops a sample is no part of its text
            self._show(self._detokenizer.push(token.token_id))
        if token.finish_reason in ("stop", "length") and self.finish_reason is None:
            self._finish(token.finish_reason)

    def _show(self, text: str) -> None:
        if self._matcher is None:
            self._text += text
            return
        self._text += self._matcher.push(text)
        if self._matcher.stopped:
            self.stopped_by_string = True
            self.finish_reason = "stop"

    def _finish(self, reason: Literal["stop", "length"]) -> None:
        self._show(self._detokenizer.finish())
        if self._matcher is not None:
            self._text += self._matcher.finish()
        self.finish_reason = self.finish_reason or reason


class OutputBuffer:
    """All samples of one request. `on_stop_string` is told at once of a sample that ends by a stop string."""

    def __init__(self, samples: Sequence[SampleOutput], on_stop_string: Callable[[int], None]) -> None:
        self._samples = samples
        self._on_stop_string = on_stop_string
        self._ready = any(sample.finish_reason for sample in samples)
        self._waiter: asyncio.Future[None] | None = None
        self._error: SplitserveError | None = None

    @property
    def complete(self) -> bool:
        """Whether every sample has its last token."""
        return all(sample.finish_reason is not None for sample in self._samples)

    @property
    def drained(self) -> bool:
        """Whether every sample's last delta has been taken."""
        return all(sample.drained for sample in self._samples)

    def accept(self, token: SampleToken) -> None:
        """Take a token of any sample."""
        if not 0 <= token.sample < len(self._samples):
            return
        sample = self._samples[token.sample]
        if sample.finish_reason is not None:
            return
        if token.finish_reason == "cancelled":
            self.fail(WorkerUnavailable(f"its engine gave up sample {sample.index}, unasked"))
            return
        sample.accept(token)
        if sample.stopped_by_string:
            self._on_stop_string(sample.index)
        self._wake()

    def fail(self, error: SplitserveError) -> None:
        """End the output with `error`, the first one given, once what came before it is drained."""
        self._error = self._error or error
        self._wake()

    async def drain(self) -> list[Delta]:
        """Wait for something new and take all of it. Raises the error that ended the output."""
        if not self._ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        self._ready = False
        deltas = [delta for sample in self._samples if (delta := sample.drain()) is not None]
        if self._error is not None and not self.complete:
            if not deltas:
                raise self._error
            self._ready = True
        return deltas

    def _wake(self) -> None:
        self._ready = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
