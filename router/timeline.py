"""Where a request's time went: the router's own clock, and the durations that engines report."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from splitserve.router.attempt import Attempt
from splitserve.router.metrics import RouterMetrics
from splitserve.router.policy import Placement


@dataclass(frozen=True)
class Timings:
    """All in seconds; a stage that was never reached took none."""

    queue_s: float
    prefill_s: float
    kv_transfer_s: float
    decode_s: float
    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Span:
    """A phase of a request, in seconds of the monotonic clock. `engine`: where it passed; "" is the router."""

    name: str
    engine: str
    start: float
    end: float
    attributes: dict[str, str | int] = field(default_factory=dict)


@dataclass
class _Leg:
    """When an attempt that was granted reached each stage."""

    attempt: int
    placement: Placement
    waited_from: float
    placed: float
    prefilled: float | None = None
    prefill_s: float = 0.0
    cached_tokens: int = 0
    joined: float | None = None
    lost: float | None = None
    reason: str = ""

    def spans(self, last: float, now: float) -> list[Span]:
        """Its phases in order. Unless it was lost, decode ends at `last`, and what has not ended at `now`."""
        prefill, decode = self.placement
        attributes: dict[str, str | int] = {"attempt": self.attempt}
        spans = [Span("queue", "", self.waited_from, self.placed, attributes)]
        lost = attributes | ({"lost": self.reason} if self.reason else {})
        end = now if self.lost is None else self.lost
        if self.prefilled is None:
            return [*spans, Span("prefill", prefill, self.placed, end, lost)]
        began = max(self.prefilled - self.prefill_s, self.placed)
        spans.append(Span("prefill queue", prefill, self.placed, began, attributes))
        cached = attributes | {"cached_tokens": self.cached_tokens}
        spans.append(Span("prefill", prefill, began, self.prefilled, cached))
        if self.joined is None:
            return [*spans, Span("KV transfer", decode, self.prefilled, end, lost)]
        joined = max(self.joined, self.prefilled)
        spans.append(Span("KV transfer", decode, self.prefilled, joined, attributes))
        return [*spans, Span("decode", decode, joined, max(joined, last if self.lost is None else end), lost)]


class Timeline:
    """When a request reached each stage of its life. `metrics` hears of each stage as it ends.

    One that `goes_on` from what another router answered has had its first token there.
    """

    def __init__(self, metrics: RouterMetrics, *, goes_on: bool = False) -> None:
        self._metrics, self._goes_on = metrics, goes_on
        self.arrived = time.monotonic()
        self._legs: dict[int, _Leg] = {}
        self._waits_from = self.arrived
        self._placed: float | None = None
        self._first_token: float | None = None
        self._joined: float | None = None
        self._last_token: float | None = None
        self._prefill_queue_s = 0.0
        self._prefill_s = 0.0

    @property
    def age_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self.arrived

    def placed(self, attempt: Attempt) -> None:
        """Decode has granted room."""
        now = time.monotonic()
        if self._placed is None:
            self._metrics.queue.observe(now - self.arrived)
        self._placed = now
        self._legs[attempt.number] = _Leg(attempt.number, attempt.placement, self._waits_from, now)

    def prefilled(self, attempt: int, queue_s: float, prefill_s: float, cached_tokens: int) -> None:
        """Prefill has answered, after waiting `queue_s` there and computing for `prefill_s`."""
        self._metrics.prefill_queue.observe(queue_s)
        self._metrics.prefill.observe(prefill_s)
        if leg := self._legs.get(attempt):
            leg.prefilled, leg.prefill_s, leg.cached_tokens = time.monotonic(), prefill_s, cached_tokens

    def first_token(self, queue_s: float, prefill_s: float) -> None:
        """That was the first answer of all, to a client that has no token yet."""
        self._first_token = self._last_token = time.monotonic()
        self._prefill_queue_s, self._prefill_s = queue_s, prefill_s
        self._metrics.ttft.observe(self._first_token - self.arrived)

    def joined(self, attempt: int) -> None:
        """Decode has taken over."""
        now = time.monotonic()
        if self._joined is None:
            self._joined = now
            if not self._goes_on:
                self._metrics.kv_transfer.observe(now - (self._first_token or now))
        if leg := self._legs.get(attempt):
            leg.joined = now

    def token(self, now: float) -> None:
        """A decode step has answered, at `now` of the monotonic clock."""
        if self._last_token is not None and now > self._last_token:  # samples of one step come together
            self._metrics.inter_token.observe(now - self._last_token)
        self._last_token = now
        if self._goes_on and self._first_token is None:
            self._first_token = now

    def lost(self, attempt: int, reason: str) -> None:
        """An attempt has lost an engine or its KV; another one waits from now on."""
        self._waits_from = time.monotonic()
        if leg := self._legs.get(attempt):
            leg.lost, leg.reason = self._waits_from, reason

    def spans(self, now: float) -> list[Span]:
        """The phases of all attempts, until `now`."""
        spans = [span for leg in self._legs.values() for span in leg.spans(self._last_token or now, now)]
        waits = not self._legs or all(leg.lost is not None for leg in self._legs.values())
        return [*spans, Span("queue", "", self._waits_from, now)] if waits else spans

    def timings(self, num_tokens: int) -> Timings:
        """The account so far; `num_tokens` is how many the longest sample got here."""
        now = time.monotonic()
        placed = self._placed or now
        first = self._first_token or now
        last = max(self._last_token or first, first)
        decode_from = max(self._joined or first, first)
        return Timings(
            queue_s=placed - self.arrived + self._prefill_queue_s,
            prefill_s=self._prefill_s,
            kv_transfer_s=decode_from - first,
            decode_s=max(last - decode_from, 0.0),
            ttft_s=0.0 if self._goes_on else first - self.arrived,
            tpot_s=(last - first) / (num_tokens - 1) if num_tokens > 1 else 0.0,
            total_s=now - self.arrived,
        )
