"""Where a request's time went: the router's own clock, and the durations that engines report."""

from __future__ import annotations

import time
from dataclasses import dataclass

from splitserve.router.metrics import RouterMetrics


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


class Timeline:
    """When a request reached each stage of its life. `metrics` hears of each stage as it ends."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics
        self._arrived = time.monotonic()
        self._placed: float | None = None
        self._first_token: float | None = None
        self._joined: float | None = None
        self._last_token: float | None = None
        self._prefill_queue_s = 0.0
        self._prefill_s = 0.0

    @property
    def age_s(self) -> float:
        """Seconds since the request arrived."""
        return time.monotonic() - self._arrived

    def placed(self) -> None:
        """Decode has granted room and prefill has been asked."""
        if self._placed is None:
            self._metrics.queue.observe(time.monotonic() - self._arrived)
        self._placed = time.monotonic()

    def first_token(self, queue_s: float, prefill_s: float) -> None:
        """Prefill has answered, after waiting `queue_s` there and computing for `prefill_s`."""
        self._first_token = self._last_token = time.monotonic()
        self._prefill_queue_s, self._prefill_s = queue_s, prefill_s
        self._metrics.ttft.observe(self._first_token - self._arrived)
        self._metrics.prefill_queue.observe(queue_s)
        self._metrics.prefill.observe(prefill_s)

    def joined(self) -> None:
        """Decode has taken over."""
        if self._joined is None:
            self._joined = time.monotonic()
            self._metrics.kv_transfer.observe(self._joined - (self._first_token or self._joined))

    def token(self, now: float) -> None:
        """A decode step has answered, at `now` of the monotonic clock."""
        if self._last_token is not None and now > self._last_token:  # samples of one step come together
            self._metrics.inter_token.observe(now - self._last_token)
        self._last_token = now

    def timings(self, num_tokens: int) -> Timings:
        """The account so far; `num_tokens` is the length of the longest sample."""
        now = time.monotonic()
        placed = self._placed or now
        first = self._first_token or now
        last = max(self._last_token or first, first)
        decode_from = max(self._joined or first, first)
        return Timings(
            queue_s=placed - self._arrived + self._prefill_queue_s,
            prefill_s=self._prefill_s,
            kv_transfer_s=decode_from - first,
            decode_s=max(last - decode_from, 0.0),
            ttft_s=first - self._arrived,
            tpot_s=(last - first) / (num_tokens - 1) if num_tokens > 1 else 0.0,
            total_s=now - self._arrived,
        )
